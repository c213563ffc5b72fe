"""Models on two and four ranks: checkpoints and exports are those of one rank, in any direction."""

from __future__ import annotations

from pathlib import Path

import pytest

import rank_saves
import zoo
from horizon_lm.checkpoint.exported import Form, export_checkpoint
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.model import model_of
from horizon_lm.config import TrainConfig
from horizon_lm.training.build import model_without_source
from rank_pool import RankPool
from rank_pool import four_ranks as four_ranks
from rank_pool import two_ranks as two_ranks
from rank_states import exported

# tied; experts fused in memory and apart on disk; parameters kept in fp32
MODELS = [("gpt2", "bfloat16"), ("mixtral", "bfloat16"), ("deepseek_v3", "bfloat16"), ("llama", "float32")]

pytestmark = pytest.mark.usefixtures("one_thread")


def joined(ranks: list[rank_saves.Bits]) -> dict[str, bytes]:
    """What ranks hold, one after the other."""
    found: dict[str, list[tuple[int, bytes]]] = {}
    for bits in ranks:
        for key, piece in bits.items():
            found.setdefault(key, []).append(piece)
    return {key: b"".join(data for _, data in sorted(pieces)) for key, pieces in found.items()}


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_two_ranks_save_and_load_what_one_does(
    name: str, dtype: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Every byte of the store, and every byte of exported folders, with one file of weights or many."""
    model = rank_saves.trained(name, dtype)
    expected = joined([rank_saves.bits(model)])
    for folder, wanted in (("model", None), ("masters", "float32")):
        model.save_pretrained(tmp_path / folder, dtype=wanted, max_shard_size="40KB")
    assert rank_saves.write(model, tmp_path / "run").error is None
    (tmp_path / "two").mkdir()
    results = two_ranks.run("rank_saves:saved", name, dtype, str(tmp_path / "two"), "40KB")
    outcomes, bits = zip(*results, strict=True)
    assert outcomes[0] == outcomes[1] and outcomes[0].error is None
    assert joined(list(bits)) == expected
    for folder in ("model", "masters"):
        assert exported(tmp_path / "two" / folder) == exported(tmp_path / folder)
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 1
    one, two = tmp_path / "run" / "checkpoint-1", tmp_path / "two" / "run" / "checkpoint-1"
    assert [open_checkpoint(path).manifest.ranks for path in (one, two)] == [1, 2]
    other = rank_saves.trained(name, dtype, steps=0)
    assert joined([rank_saves.bits(other)]) != expected  # the control
    rank_saves.load_checkpoint(open_checkpoint(two), other)
    assert joined([rank_saves.bits(other)]) == expected
    for path in (one, two):
        assert joined(two_ranks.run("rank_saves:loaded", name, dtype, str(path))) == expected


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_one_process_exports_a_checkpoint_of_several_ranks(
    name: str, dtype: str, four_ranks: RankPool, tmp_path: Path
) -> None:
    outcome, _ = four_ranks.run("rank_saves:saved", name, dtype, str(tmp_path), "5GB")[0]
    for folder, wanted in (("model", None), ("masters", "float32")):
        target = tmp_path / f"exported {folder}"
        export_checkpoint(outcome.path, target, Form(wanted))
        assert exported(target) == exported(tmp_path / folder)
    checkpoint, attention = open_checkpoint(outcome.path), zoo._find(name).attn
    weights = model_of(checkpoint, trust_remote_code=False, attn_implementation=attention)
    expected = rank_saves.trained(name, dtype)
    masters = dict(expected.named_parameters())
    for key, value in weights.named_parameters():
        assert value.equal(masters[key].to(value.dtype)), key
    settings = {"device": "cpu", "dtype": dtype, "attn_implementation": attention}
    config = TrainConfig.from_dict({"model_name_or_path": "gone", "datasets": "none", **settings})
    model = model_without_source(checkpoint, config)
    rank_saves.load_checkpoint(checkpoint, model)
    assert rank_saves.bits(model) == rank_saves.bits(expected)


def test_an_export_of_ranks_takes_the_memory_of_a_unit(two_ranks: RankPool, tmp_path: Path) -> None:
    """25 M parameters in fp32 from bf16: 100 MB of weights, of which no unit has more than 8 MB."""
    grown = two_ranks.run("rank_saves:grown_by_export", str(tmp_path / "out"))
    total = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert total > 95e6
    print(f"{total / 1e6:.0f} MB exported with {', '.join(f'{n / 1e6:.0f}' for n in grown)} MB of memory")
    assert max(grown) < 0.7 * total


def test_an_export_that_fails_on_rank_0_fails_on_all_and_harms_nothing(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    said = two_ranks.run("rank_saves:refused", "llama", str(tmp_path))
    assert said[0] == said[1]
    assert "ConfigError: " in said[0] and "DoesNotFitError: " in said[0] and "No space left" in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "good"}
