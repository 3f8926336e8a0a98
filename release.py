"""A release: encoder, user tower, reranker, vocabularies, schema and manifest, saved and loaded as one.

Item vectors belong to the encoder that made them, so these parts never mix. A release is a folder in `saved_models/`; the
training scripts fill it, `build_index.py` completes it, and the file `saved_models/current` names the live one. Changing that
file (atomically) is what makes a release live or rolls it back; API workers notice without a restart. Machines that serve one shop
share the folder.

    python release.py list
    python release.py promote 20260101-120000
    python release.py rollback                 # to what was live before
    python release.py delete 20260101-120000   # its folder and its vectors

What was live before stands in `saved_models/promotions.jsonl`, beside the pointer and written by whoever moves it, so that the two
cannot be of different minds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor, nn
from tqdm import tqdm

from catalog import FeatureSchema, Product
from model_reranker import FusedDeepFM, RerankerConfig, build_deepfm
from model_simcse import ItemTower, ItemTowerConfig
from model_user import UserTower, UserTowerConfig
from search_space import SearchSpace
from settings import Settings, UserError, run_script
from tensors import ItemFeatures, ItemLayout, ProfileScaler, distinct, item_features
from vocab import ReVocab, StdVocab

if TYPE_CHECKING:
    from store import Store
    from text_encoder import TextEncoder

ENCODER, USER_TOWER, RERANKER = "encoder_stage1.pth", "user_tower.pth", "reranker_deepfm.pth"
# The user tower before its last fit on all data: the reranker learns from lists that its training targets never shaped.
USER_TOWER_HOLDOUT = "user_tower_holdout.pth"
SEARCH_SPACE = "search_space.pth"
PARTS = ("item_tower", "user_tower", "reranker", "index")  # of a complete release, in the order in which they are made
PROMOTIONS = "promotions.jsonl"

# A checkpoint is refused beyond this size before a byte of it is read.
MAX_CHECKPOINT_BYTES = 8 * 2**30
EMBED_BATCH = 1024
MEND = "restore it, train again, or use another release"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")  # a table of the database has it too: see store/vectors.py

Part = TypeVar("Part")


class NotLiveError(UserError):
    """Another release is live than the one that whoever asks for a change goes by."""

    def __init__(self, expected: str, live: str | None) -> None:
        super().__init__(f"release {live or 'none'} is live, not {expected}: nothing was changed")


class Release:
    """A release folder and its manifest. `name` is the folder's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.manifest: dict[str, Any] = {}
        if (folder / "manifest.json").exists():
            self.manifest = self._read("manifest.json", _manifest)

    # ------------------------------------------------------------------------------------------------- find and make
    @staticmethod
    def new_name() -> str:
        """The time, so names sort by age."""
        return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")

    @classmethod
    def create(cls, models_dir: Path, name: str) -> Release:
        """The release `name`, made empty if there is none."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is no release name: use lower-case letters, digits, '_' and '-', at most 40")
        folder = models_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        release = cls(folder)
        release.manifest.setdefault("name", name)
        release.manifest.setdefault("created_at", datetime.now(UTC).isoformat(timespec="seconds"))
        release.save_manifest()
        return release

    @classmethod
    def names(cls, models_dir: Path) -> list[str]:
        """Names of the releases in `models_dir`, oldest first. One whose manifest is damaged is no obstacle to the others."""
        found = []
        for manifest in models_dir.glob("*/manifest.json"):
            with suppress(UserError):
                found.append((cls(manifest.parent).manifest["created_at"], manifest.parent.name))
        return [name for _, name in sorted(found)]

    @classmethod
    def open(cls, models_dir: Path, name: str = "") -> Release:
        """The release `name`, or the newest. Raises UserError when there is none."""
        if _NAME.fullmatch(name) and (models_dir / name / "manifest.json").exists():
            return cls(models_dir / name)
        names = cls.names(models_dir)
        if name:
            raise UserError(f"no release {name!r} in {models_dir} (there are: {', '.join(names) or 'none'})")
        if not names:
            raise UserError(f"no release in {models_dir} yet; run train_simcse.py first")
        return cls(models_dir / names[-1])

    # ---------------------------------------------------------------------------------------------------- live pointer
    @staticmethod
    def current(models_dir: Path) -> str | None:
        """The live release's name, or None when nothing is live."""
        try:
            return (models_dir / "current").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    @classmethod
    def past(cls, models_dir: Path) -> list[str]:
        """What was live, oldest first, the live one last. A rollback takes what it left behind out of the past."""
        past: list[str] = []
        for entry in _moves(models_dir):
            if entry["back"]:
                while past and past[-1] != entry["release"]:
                    past.pop()
            if past[-1:] != [entry["release"]]:
                past.append(entry["release"])
        current = cls.current(models_dir)
        return past if current is None or past[-1:] == [current] else [*past, current]

    @classmethod
    def previous(cls, models_dir: Path) -> str | None:
        """The release that was live before the live one, of those that still exist."""
        existing = {*cls.names(models_dir)} - {cls.current(models_dir)}
        return next((name for name in reversed(cls.past(models_dir)) if name in existing), None)

    def check_complete(self) -> None:
        missing = [part for part in PARTS if part not in self.manifest]
        if missing:
            raise UserError(f"release {self.name} is not complete (missing: {', '.join(missing)}); it cannot go live")

    def make_live(self, back: bool = False, expected: str | None = None) -> None:
        """Point `current` here, in one atomic step, as a promotion or the way `back`; where it points here already, nothing is
        done. Raises UserError unless the release is complete and there, NotLiveError when neither `expected` nor this one is
        live."""
        self.check_complete()
        models_dir = self.folder.parent
        pointer = models_dir / "current"
        temporary = pointer.with_suffix(f".{os.getpid()}.tmp")
        with _promotions(models_dir) as log:
            self.open(models_dir, self.name)  # it may have been deleted while whoever calls was checking it
            before = self.current(models_dir)
            if before == self.name:  # a second line would hide which release the first one left
                return
            if expected not in (None, before):
                raise NotLiveError(str(expected), before)
            if before is not None and not log.tell():  # the first entry: what was live before it counts as well
                log.write(_promotion(before, back=False, left=None))
            temporary.write_text(self.name + "\n", encoding="utf-8")
            os.replace(temporary, pointer)
            log.write(_promotion(self.name, back, before))

    # ------------------------------------------------------------------------------------------------------- save, load
    def save_manifest(self) -> None:
        temporary = self.folder / f"manifest.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(self.manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(temporary, self.folder / "manifest.json")

    def save_weights(self, file: str, model: nn.Module) -> None:
        """Write a state dict, atomically, and note its sha256. Raises UserError on a value that is not finite."""
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        if (key := _not_finite(state)) is not None:
            raise UserError(f"the training of {file} diverged: {key!r} is not finite; try a smaller --learning-rate")
        temporary = self.folder / f"{file}.{os.getpid()}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / file)
        self.manifest.setdefault("files", {})[file] = _sha256(self.folder / file)
        self.save_manifest()

    def load_weights(self, file: str, model: nn.Module) -> None:
        """Load what `save_weights` wrote into `model`: size, checksum, shapes and finiteness are all checked."""
        path = self.folder / file
        if not path.exists():
            raise UserError(f"release {self.name} has no {file}; run the training script that makes it")
        if path.stat().st_size > MAX_CHECKPOINT_BYTES:
            raise UserError(
                f"{path} is {path.stat().st_size} bytes, more than any model of ours, and was not read; {MEND}"
            )
        if _sha256(path) != self.manifest.get("files", {}).get(file):
            raise UserError(f"{path} is not the file this release was made with (sha256 differs); {MEND}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:  # torch raises anything from KeyError to UnpicklingError on a damaged file
            raise UserError(f"{path} cannot be loaded; {MEND} ({error})") from error
        if (key := _not_finite(state)) is not None:
            raise UserError(f"{path} cannot be used: {key!r} is not finite; {MEND}")
        model.eval()

    def check_files(self) -> None:
        """Raises UserError when a weight file is missing or not the one this release was made with."""
        for file, sha256 in self.manifest.get("files", {}).items():
            path = self.folder / file
            if not path.exists() or _sha256(path) != sha256:
                raise UserError(
                    f"{path} is missing or not the file this release was made with (sha256 differs); {MEND}"
                )

    def save_vocabularies(self, schema: FeatureSchema, std: StdVocab, re_vocab: ReVocab) -> None:
        (self.folder / "schema.json").write_text(schema.model_dump_json(indent=1), encoding="utf-8")
        std.save(self.folder / "std_vocab.json")
        re_vocab.save(self.folder / "re_vocab.json")

    # ------------------------------------------------------------------------------------------------------------ parts
    def schema(self) -> FeatureSchema:
        return self._read("schema.json", lambda path: FeatureSchema.model_validate_json(path.read_bytes()))

    def vocabularies(self) -> tuple[StdVocab, ReVocab]:
        return self._read("std_vocab.json", StdVocab.load), self._read("re_vocab.json", ReVocab.load)

    def item_tower(self) -> ItemTower:
        tower = ItemTower(ItemTowerConfig(**self._part("item_tower")["config"]))
        self.load_weights(ENCODER, tower)
        return tower

    def item_layout(self) -> ItemLayout:
        return ItemLayout(**self._part("item_tower")["layout"])

    def user_tower(self, file: str = USER_TOWER) -> UserTower:
        tower = UserTower(UserTowerConfig(**self._part("user_tower")["config"]))
        self.load_weights(file, tower)
        return tower

    @property
    def learned_from_events(self) -> bool:
        """Whether its user tower learned anything: that of a shop whose log was empty, or too short, did not."""
        return "report" in self._part("user_tower")

    def search_space(self) -> SearchSpace:
        space = SearchSpace(int(self._part("index")["dimensions"]))
        if SEARCH_SPACE not in self.manifest.get("files", {}):
            raise UserError(
                f"release {self.name} was indexed by an earlier version of this program; run build_index.py --release {self.name}"
            )
        self.load_weights(SEARCH_SPACE, space)
        return space

    def save_trained_items(self, product_ids: Sequence[str]) -> None:
        """Which product each row of the collaborative table belongs to."""
        (self.folder / "trained_items.json").write_text(
            json.dumps(list(product_ids), ensure_ascii=False), encoding="utf-8"
        )

    def aligned_user_tower(self, product_ids: Sequence[str], file: str = USER_TOWER) -> UserTower:
        """The user tower with its collaborative table in the order of `product_ids`."""
        trained = self._read("trained_items.json", lambda path: json.loads(path.read_bytes()))
        row_of = {product_id: row for row, product_id in enumerate(trained)}
        tower = self.user_tower(file)
        tower.realign([row_of.get(product_id, -1) for product_id in product_ids])
        return tower

    def profile_scaler(self) -> ProfileScaler:
        return ProfileScaler(**self._part("user_tower")["profile_scaler"])

    def reranker_config(self) -> RerankerConfig:
        saved = self._part("reranker")["config"]
        # An earlier version trusted the model with strangers as far as with everybody else.
        alike = {"stranger_trust": saved.get("trust", 1.0)}
        return RerankerConfig(**{**alike, **saved, "hidden": tuple(saved["hidden"])})

    def reranker(self) -> FusedDeepFM:
        config = self.reranker_config()
        model = build_deepfm(config)
        self.load_weights(RERANKER, model)
        return FusedDeepFM(model, config).eval()

    def check_text_encoder(self, encoder: TextEncoder) -> None:
        """Raises UserError when `encoder` is not the one this release was trained with."""
        saved = self._part("item_tower")["text_encoder"]
        if saved["fingerprint"] != encoder.fingerprint:
            raise UserError(
                f"release {self.name} was trained with text encoder {saved['name']!r} ({saved['fingerprint'][:12]}), but "
                f"{encoder.name!r} ({encoder.fingerprint[:12]}) is configured; set TEXT_ENCODER (or TEXT_ENCODER_LAYERS) back, "
                "or train anew"
            )

    def record(self, part: str, **values: Any) -> None:
        """Note a finished part (`item_tower`, `user_tower`, `reranker`, `index`) in the manifest."""
        self.manifest[part] = {
            key: asdict(value) if hasattr(value, "__dataclass_fields__") else value for key, value in values.items()
        }
        self.save_manifest()

    def _read(self, file: str, read: Callable[[Path], Part]) -> Part:
        path = self.folder / file
        try:
            return read(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged; {MEND} ({error})") from error

    def _part(self, part: str) -> dict[str, Any]:
        if part not in self.manifest:
            raise UserError(f"release {self.name} has no {part} yet; run the training script that makes it")
        return self.manifest[part]


class ItemEncoder:
    """Products to item vectors with one release's encoder: vocabularies, item tower, text encoder."""

    def __init__(self, release: Release, text_encoder: TextEncoder) -> None:
        release.check_text_encoder(text_encoder)
        self.std_vocab, self.re_vocab = release.vocabularies()
        self.layout = release.item_layout()
        self.tower = release.item_tower()
        self.text_encoder = text_encoder
        self.cache = release.folder / "item_vectors.npz"

    def learn_words(
        self, words: Mapping[tuple[str, str], int], also: Callable[[Tensor], None] = lambda rows: None
    ) -> None:
        """Add RE words that came after training, under the ids the database gave them (dense, in order).

        also: given the new rows of the table [K, dim] before the vocabulary grows, whose length tells other threads which ids every
        model knows. Raises UserError when the ids leave a hole.
        """
        vocab = self.re_vocab
        new = sorted((word_id, field, value) for (field, value), word_id in words.items() if word_id >= len(vocab))
        if not new:
            return
        text = torch.from_numpy(self.text_encoder.pooled([value for _, _, value in new]))
        rows = self.tower.re_embedding(text).detach()
        self.tower.grow([vocab.field_names.index(field) + 1 for _, field, _ in new], text)
        also(rows)
        for word_id, field, value in new:
            if vocab.grow(field, value) != [word_id]:
                raise UserError(
                    f"the RE vocabulary of release {self.cache.parent.name} has a hole before id {word_id}; train another release"
                )

    def features(self, products: Sequence[Product]) -> ItemFeatures:
        return catalogue_features(products, self.std_vocab, self.re_vocab, self.layout, self.text_encoder)

    @torch.inference_mode()
    def vectors(self, features: ItemFeatures, progress: bool = True) -> np.ndarray:
        """Unit vectors float32 [N, output]."""
        output = np.empty((len(features), self.tower.config.output), dtype=np.float32)
        starts = range(0, len(features), EMBED_BATCH)
        for start in tqdm(
            starts, desc="item vectors", unit="batch", disable=not progress or len(starts) < 4, leave=False
        ):
            rows = np.arange(start, min(start + EMBED_BATCH, len(features)))
            output[rows] = self.tower(features.batch(rows)).numpy()
        return output

    def cached_vectors(self, features: ItemFeatures) -> np.ndarray:
        """The same, kept beside the release between the stages that need every item's vector."""
        digest = hashlib.sha256()
        for array in (features.std, features.re, features.title_of, features.titles.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\x00".join(features.product_ids).encode())
        digest.update(_sha256(self.cache.parent / ENCODER).encode())
        digest.update(repr(self.tower.config).encode())  # the same weights may be read in another way
        key = digest.hexdigest()
        if self.cache.exists():
            try:
                with np.load(self.cache, allow_pickle=False) as saved:
                    if str(saved["key"]) == key:
                        return saved["vectors"]
            except (OSError, ValueError, KeyError):
                pass  # a cache cut short by a kill is made again
        vectors = self.vectors(features)
        temporary = self.cache.with_name(f"item_vectors.{os.getpid()}.tmp.npz")
        np.savez(temporary, key=np.array(key), vectors=vectors)
        os.replace(temporary, self.cache)
        return vectors


def catalogue_features(
    products: Sequence[Product], std_vocab: StdVocab, re_vocab: ReVocab, layout: ItemLayout, text_encoder: TextEncoder
) -> ItemFeatures:
    """Arrays of a catalogue with its title token vectors, each distinct title encoded once ever (see TextCache)."""
    titles, title_of = distinct([product.title for product in products])
    return item_features(products, std_vocab, re_vocab, layout, text_encoder.cached_tokens(titles), title_of)


def promote(
    store: Store, models_dir: Path, name: str, back: bool = False, text_encoder: TextEncoder | None = None,
    expected: str | None = None,
) -> None:  # fmt: skip
    """Make a release live, as a promotion or on the way `back`. Raises UserError, and changes nothing, unless it is there,
    complete, undamaged, indexed in this database, and made with the `text_encoder` that serves, if that is known; NotLiveError
    unless `expected` is live, if that is given, or the release itself already."""
    release = Release.open(models_dir, name)
    release.check_complete()
    release.check_files()
    if text_encoder is not None:
        release.check_text_encoder(text_encoder)
    if not store.vectors.holds_rows(name):
        raise UserError(f"release {name} has no vectors in this database; run build_index.py --release {name}")
    release.make_live(back, expected)


def rollback(
    store: Store, models_dir: Path, text_encoder: TextEncoder | None = None, expected: str | None = None
) -> str:
    """Make live what was live before; returns its name. With `expected`, the release to leave, it is done once, however often it is
    asked for. Raises UserError when there is nothing to go back to, NotLiveError when another than `expected` is live."""
    if not models_dir.is_dir():
        raise UserError(f"there is no folder {models_dir}; MODELS_DIR says where the releases are")
    with _promotions(models_dir):  # the pointer and the log of one moment
        live, moves = Release.current(models_dir), _moves(models_dir)
        name = Release.previous(models_dir)
    if expected not in (None, live):
        last = moves[-1] if moves else {}
        if live is not None and last.get("back") and (last["release"], last.get("left")) == (live, expected):
            return live  # asked once more, since nobody heard that it was done
        raise NotLiveError(str(expected), live)
    if name is None:
        raise UserError("there is no release that was live before this one; promote one by its name")
    promote(store, models_dir, name, back=True, text_encoder=text_encoder, expected=live)
    return name


def delete(store: Store, models_dir: Path, name: str) -> None:
    """Remove a release: its vectors, what the database knows of it, and its folder. Raises UserError when it is live, part of
    an experiment that runs, or not there.

    May be repeated when it was interrupted.
    """
    folder = models_dir / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        Release.open(models_dir, name or "''")  # says which there are
    with _promotions(models_dir):  # nobody makes it live meanwhile
        if Release.current(models_dir) == name:
            raise UserError(f"release {name} is live; promote another one first")
        experiment = store.experiments.running()
        if experiment is not None and name in {arm.release for arm in experiment.arms}:
            raise UserError(f"release {name} answers in the experiment {experiment.name!r}; stop that first")
        store.vectors.drop_all(name)
        store.releases.delete(name)
        shutil.rmtree(folder)


def report_metrics(manifest: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What each part's training said of its best epoch, on what it held out."""
    reports = {part: manifest[part]["report"] for part in PARTS if "report" in manifest.get(part, {})}
    return {part: {report["metric"]: report["best"]} for part, report in reports.items()}


class ReleaseOptions(Settings):
    """List releases, make one live, go back to the one before, delete one."""

    action: CliPositionalArg[Literal["list", "promote", "rollback", "delete"]] = Field(description="what to do")
    name: CliPositionalArg[str] = Field("", description="promote, delete: the release")


def main(options: ReleaseOptions) -> None:
    from recommender import Recommender  # these know this file
    from store import Store
    from text_encoder import TextEncoder

    models_dir = options.models_dir
    if options.action == "list":
        live = Release.current(models_dir)
        for name in Release.names(models_dir):
            manifest = Release.open(models_dir, name).manifest
            metrics = [
                f"{key} {value:.4f}" for part in report_metrics(manifest).values() for key, value in part.items()
            ]
            state = "live" if name == live else "" if PARTS[-1] in manifest else "incomplete"
            print(f"{name:20} {state:10} {'  '.join(metrics)}")
        return
    if options.action != "rollback" and not options.name:
        raise UserError(f"{options.action} needs the name of a release; release.py list shows them")
    with Store.open(options) as store:
        if options.action == "delete":
            delete(store, models_dir, options.name)
            print(f"release {options.name} is deleted")
            return
        text_encoder = TextEncoder.load(options)
        if options.action == "promote":
            promote(store, models_dir, options.name, text_encoder=text_encoder)
        else:
            rollback(store, models_dir, text_encoder)
        print(f"release {Release.current(models_dir)} is live")
        count = Recommender(store, options, text_encoder).catch_up()
        if count:
            print(f"{count} products that came or changed while another one was live are indexed too")


@contextmanager
def _promotions(models_dir: Path) -> Iterator[IO[str]]:
    """The log of promotions, to append to, held by one process at a time."""
    with (models_dir / PROMOTIONS).open("a", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.seek(0, os.SEEK_END)
        yield log


def _moves(models_dir: Path) -> list[dict[str, Any]]:
    """The log of promotions, the oldest first."""
    moves = []
    with suppress(FileNotFoundError):
        for line in (models_dir / PROMOTIONS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that a full disk cut short
                entry = json.loads(line)
                if isinstance(entry, dict) and "release" in entry and "back" in entry:
                    moves.append(entry)
    return moves


def _promotion(name: str, back: bool, left: str | None) -> str:
    """A line of the log. `left` was live before."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"release": name, "back": back, "left": left, "at": at}) + "\n"


def _manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict) or "created_at" not in manifest:
        raise ValueError("it is no manifest of ours")
    return manifest


def _not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds an infinity or a NaN."""
    for key, value in state.items():
        if value.is_floating_point() and not math.isfinite(float(value.sum())) and not torch.isfinite(value).all():
            return key
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run_script(ReleaseOptions, main)
