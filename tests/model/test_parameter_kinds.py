"""Which parameters decay, and which a bf16 model keeps in fp32: transformers is the authority for both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer
from transformers.initialization import no_init_weights

import horizon_lm as hz
import zoo
from horizon_lm.memory.layout import Parameter
from horizon_lm.model.skeleton import Skeleton, _is_norm, _owners
from horizon_lm.optim.optimizer import group_rule
from sizes import SOAK

pytestmark = pytest.mark.usefixtures("one_thread")

# Projections that transformers' Trainer spares by accident, as a module around them has "norm" in its name.
PROJECTIONS = {
    "dbrx": {"norm_attn_norm.attn.Wqkv.weight", "norm_attn_norm.attn.out_proj.weight"},
    "axk2": {
        f"{norm}.mlp.fc{i}.weight" for norm in ("input_layernorm", "post_attention_layernorm") for i in (1, 2)
    },
}
# Norms of two dimensions: what decision by shape alone let decay.
WIDE_NORMS = {"cohere": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}}


def ends(name: str, tails: set[str]) -> bool:
    return any(name.endswith(f".{tail}") for tail in tails)


# Norms of all kinds, projections within norms, embeddings that normalise; the whole zoo in `make soak`.
FEW = [
    *("llama", "cohere", "dbrx", "axk2", "inkling_text", "nemotron", "stablelm", "gpt2", "mamba2", "mpt"),
    *("qwen3_next", "gemma3_text", "zamba2", "deepseek_v4", "xlstm", "olmo_hybrid"),
]


def test_decay_is_that_of_transformers_trainer_but_for_one_dimension() -> None:
    """Every parameter of a model. The control: the norms that have two dimensions are there, and found."""
    names = FEW if not SOAK else [*zoo.CASES, *zoo.SHARED_STATE]
    by_shape: dict[str, set[str]] = {}
    for case in names:
        with torch.device("meta"), no_init_weights():
            model = zoo._from_config(zoo._find(case).config(), torch.float32, 0, "eager")
        owners, _ = _owners(model)
        rule = group_rule(
            {},
            decay_embeddings=True,
            is_embedding=lambda name: False,
            is_norm=lambda name, owners=owners: any(_is_norm(owner) for owner, _ in owners[name]),
        )
        theirs = set(Trainer.get_decay_parameter_names(None, model))
        for name, value in model.named_parameters():
            decays = rule(Parameter(name, tuple(value.shape), 0, True, torch.float32)).decays
            expected = name in theirs and value.dim() > 1 or ends(name, PROJECTIONS.get(case, set()))
            assert decays == expected, (case, name)
            if not decays and value.dim() > 1 and not name.endswith("bias"):
                by_shape.setdefault(case, set()).add(name)
    assert set(by_shape) == set(WIDE_NORMS)
    assert all(ends(name, WIDE_NORMS[case]) for case, found in by_shape.items() for name in found)


def test_two_dimensional_norms_do_not_decay() -> None:
    """Cohere's q_norm has a row for each head. Without a gradient to follow, decay alone moves a weight."""
    source = zoo.build("cohere")
    start = {name: value.detach().clone() for name, value in source.named_parameters()}
    model = hz.HostModel.from_pretrained(source, device="cpu", dtype="float32", optim="sgd")
    batch = zoo.batch("cohere")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, -1] = 5
    model.train_step([batch], lr=1e-6, weight_decay=1e5, max_grad_norm=None)
    for name, master in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert master.dim() == 2
            torch.testing.assert_close(master, start[name], rtol=1e-4, atol=0)
        elif name.endswith("q_proj.weight"):  # the control
            torch.testing.assert_close(master, start[name] * 0.9, rtol=1e-3, atol=1e-5)


# Of each kind: `_keep_in_fp32_modules` (for fp16 alone), `_keep_in_fp32_modules_strict`, created in fp32.
KEPT = {
    "gpt_oss": set(),
    "afmoe": set(),
    "longcat_flash": set(),
    "flint": {"gate.weight", "sinks"},
    "hunyuan_v1_moe": {"gate.wg.weight"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a model in a number format."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp(name)
            model = copy.deepcopy(zoo.build(name)).to(dtype)
            model.config.dtype = dtype
            model.save_pretrained(made[name, dtype])
        return made[name, dtype]

    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.bfloat16], ids=["fp16", "fp32", "bf16"]
)
@pytest.mark.parametrize("name", KEPT)
def test_a_bf16_model_keeps_in_fp32_what_transformers_keeps(
    name: str, dtype: torch.dtype, saved: Any
) -> None:
    """Whatever the number format of its files, as transformers loads them with dtype=bfloat16."""
    folder = saved(name, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = {n for n, p in theirs.named_parameters() if p.dtype == torch.float32}
    assert bool(expected) == bool(KEPT[name]) and all(ends(n, KEPT[name]) for n in expected)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if dtype == torch.float16 and not expected:  # the control: the loader has widened some for fp16
        assert any(p.dtype == torch.float32 for p in loaded.parameters())
    units = Skeleton(loaded, torch.bfloat16).units
    assert {p.name for u in units for p in u.parameters if p.compute_dtype == torch.float32} == expected


@pytest.mark.parametrize("name", ["gpt_oss", "hunyuan_v1_moe"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_the_loss_in_bf16_is_that_of_transformers(name: str, dtype: torch.dtype, saved: Any) -> None:
    """And the masters are what the files hold: all from fp16, and from fp32 but one in 131,072."""
    folder, batch = saved(name, dtype), zoo.batch(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model = hz.HostModel.from_pretrained(folder, device="cpu", dtype="bfloat16", attn_implementation="eager")
    with torch.no_grad():
        logits = theirs(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert model.evaluate([batch]).loss == pytest.approx(float(expected), abs=1e-6)
    held = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for key, master in model.named_parameters():
        moved = (held[key].view(torch.int32) & 0x1FFFF) == 0x7FFF
        assert torch.equal(master[~moved], held[key][~moved])
        assert not (dtype == torch.float16 and moved.any())
