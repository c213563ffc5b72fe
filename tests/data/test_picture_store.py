"""Pictures in the token cache, and their features on disk: found again, told apart, damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from data_helpers import config, write_parquet, write_rows
from horizon_lm.data import TrainingData, load_training_data
from horizon_lm.data import feature_cache as module
from horizon_lm.data.feature_cache import FeatureCache, FeaturesOf
from horizon_lm.data.loader import TokenLoader
from horizon_lm.errors import DataError, DoesNotFitError
from tiny_processors import llava, pictures


def fill(folder: Path, number: int = 3) -> Path:
    """Rows that show pictures 0, 1, ..., 0 again."""
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures(number)):
        picture.save(folder / f"{i}.png")
    chats = []
    for i in (*range(number), 0):
        answer = {"role": "assistant", "content": f"It is {i}."}
        chats.append({"images": [f"{i}.png"], "messages": [{"role": "user", "content": "What?"}, answer]})
    return write_rows(folder / "a.jsonl", chats)


def loaded(path: Path, tmp_path: Path, **changes: Any) -> TrainingData:
    if not (tmp_path / "processor").exists():
        llava().save_pretrained(tmp_path / "processor")
    values = {
        "datasets": str(path),
        "tokenizer_name_or_path": str(tmp_path / "processor"),
        "max_length": 64,
        "dataset_cache_dir": str(tmp_path / "cache"),
    }
    return load_training_data(config(**{**values, **changes}))


def test_a_picture_in_two_rows_is_there_once(tmp_path: Path) -> None:
    data = loaded(fill(tmp_path / "a"), tmp_path)
    shown = data.store.pictures
    assert shown is not None and len(shown) == 3
    assert [row.shown for row in map(data.rows.row, range(4))] == [(0,), (1,), (2,), (0,)]
    assert shown.counts.tolist() == [16, 16, 16]
    assert [source["pixels"] for source in shown.sources] == [list(p.size) for p in pictures(3)]


def test_cached_tokens_are_found_until_a_picture_changes(tmp_path: Path) -> None:
    path = fill(tmp_path / "a")
    first = loaded(path, tmp_path)
    assert not first.was_cached and loaded(path, tmp_path).was_cached
    state = first.loader.state_dict()
    (tmp_path / "a/1.png").touch()  # another time, the same bytes
    assert loaded(path, tmp_path).was_cached
    PIL.Image.new("RGB", (40, 32)).save(tmp_path / "a/1.png")
    changed = loaded(path, tmp_path)
    assert not changed.was_cached
    with pytest.raises(DataError, match="the tokens are the same, but the pictures differ"):
        changed.loader.load_state_dict(state)
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl:2: the picture .*1\.png does not exist"):
        loaded(path, tmp_path)


def test_the_same_pictures_elsewhere_are_the_same_data(tmp_path: Path) -> None:
    first = loaded(fill(tmp_path / "a"), tmp_path)
    shutil.move(tmp_path / "a", tmp_path / "b")
    second = loaded(tmp_path / "b/a.jsonl", tmp_path)
    assert not second.was_cached, "the first store's paths lead nowhere now"
    assert second.rows.fingerprint == first.rows.fingerprint
    pictures_of = second.store.pictures
    assert pictures_of is not None and str(tmp_path / "b") in pictures_of.sources[0]["path"]


def test_embedded_pictures_are_kept_beside_the_tokens(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    stored = [{"bytes": (tmp_path / f"a/{i}.png").read_bytes(), "path": None} for i in (0, 1, 0)]
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    path = write_parquet(tmp_path / "a.parquet", {"messages": [chat] * 3, "image": stored})
    data = loaded(path, tmp_path)
    path.unlink()  # the store holds what it needs
    shown = data.store.pictures
    assert shown is not None and len(shown) == 2
    assert [shown.load(i).image.size for i in range(2)] == [p.size for p in pictures(2)]


@pytest.mark.parametrize("name", ["sources.jsonl", "pictures.bin", "shown.bin"])
def test_a_damaged_store_is_made_again(name: str, tmp_path: Path) -> None:
    path = fill(tmp_path / "a")
    folder = loaded(path, tmp_path).store.folder
    content = bytearray((folder / name).read_bytes())
    content[3] ^= 1
    (folder / name).write_bytes(content)
    again = loaded(path, tmp_path)
    assert not again.was_cached and loaded(path, tmp_path).was_cached


def features(number: int) -> dict[str, torch.Tensor]:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
    return {"features": values.bfloat16(), "order": torch.arange(4)}


def key(number: int) -> bytes:
    return bytes([number]) * 16


def filled(folder: Path | None, numbers: range = range(5)) -> FeatureCache:
    cache = FeatureCache(folder, "key")
    for number in numbers:
        cache.add(key(number), features(number))
    cache.flush()
    return cache


@pytest.mark.parametrize("is_temporary", [False, True])
def test_features_are_read_as_they_were_written(is_temporary: bool, tmp_path: Path) -> None:
    cache = filled(None if is_temporary else tmp_path)
    if not is_temporary:
        cache = FeatureCache(tmp_path, "key")
        assert key(0) not in FeatureCache(tmp_path, "another key")
    for number in range(5):
        found = cache.read(key(number))
        assert found.keys() == features(number).keys()
        assert all(torch.equal(found[name], value) for name, value in features(number).items())
    assert cache.folder.exists()
    place = cache.folder
    del cache, found
    assert place.exists() != is_temporary


def test_an_interrupted_cache_goes_on_after_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * 96)  # two pictures
    cache = FeatureCache(tmp_path, "key")
    for number in range(5):
        cache.add(key(number), features(number))
    again = FeatureCache(tmp_path, "key")  # without a last flush
    assert [key(number) in again for number in range(5)] == [True] * 4 + [False]


def test_damaged_features_are_made_again_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = filled(tmp_path).folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(module, "_CHECKED_BYTES", 0)  # as with a large cache
    cache = FeatureCache(tmp_path, "key")
    assert not cache.damaged
    with pytest.raises(DataError, match="are damaged"):
        for number in range(5):
            cache.read(key(number))
    monkeypatch.undo()
    found = FeatureCache(tmp_path, "key")
    assert found.damaged and key(0) not in found and not shard.exists()
    (shard,) = filled(tmp_path).folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])  # cut short
    assert FeatureCache(tmp_path, "key").damaged


def test_a_full_disk_is_told_before(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "key")
    cache.check_room(1)
    with pytest.raises(DoesNotFitError, match="the features of the pictures need 1,000 TB of disk space"):
        cache.check_room(10**15)


def batches(data: TrainingData, cache: FeatureCache, **settings: Any) -> TokenLoader:
    shown = data.store.pictures
    assert shown is not None
    for number, picture in enumerate(shown.keys):
        cache.add(picture, features(number))
    cache.flush()
    shown.features = FeaturesOf(cache, shown.keys, ("image_grid_thw",))
    return TokenLoader(data.rows, micro_batch_size=2, micro_batches_per_step=2, seed=1, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_have_their_features_in_order_and_after_a_resume(
    num_workers: int, tmp_path: Path
) -> None:
    data, cache = loaded(fill(tmp_path / "a"), tmp_path), FeatureCache(None, "key")
    loader = batches(data, cache, num_workers=num_workers)
    first = next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    second = next(loader)
    for batch in (*first, *second):
        found: Any = batch["image_features"]
        images = data.tokenizer.convert_tokens_to_ids("<image>")
        assert int((batch["input_ids"] == images).sum()) == 16 * len(found) == 32
        rows = [data.rows.row(i) for i in range(4)]
        texts = [row.ids.tolist() for row in rows]
        mask = batch["attention_mask"].bool()
        numbers = [texts.index(ids[m].tolist()) for ids, m in zip(batch["input_ids"], mask, strict=True)]
        expected = [features(rows[number].shown[0]) for number in numbers]
        assert all(torch.equal(a["features"], b["features"]) for a, b in zip(found, expected, strict=True))
    again = batches(data, cache)
    again.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in next(again)] == [
        batch["input_ids"].tolist() for batch in second
    ]
    loader.close()
