"""A model bound whole for a rollout: transformers' tokens, no second copy on the CPU, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import horizon_lm as hz
import zoo
from emulated_cuda import EmulatedCuda
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.trainers.generation import check_device_memory, copy_bytes, named_weights, resident
from known_states import bytes_of, same

# Untied, tied, tied with windows and scaled embeddings, experts.
NAMES = ("llama", "qwen3", "gemma3_text", "mixtral")
PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}


def host_of(name: str, dtype: str = "float32", device: str = "cpu", **settings: Any) -> hz.HostModel:
    model = zoo.build(name, getattr(torch, dtype))
    return hz.HostModel.from_pretrained(model, device=device, dtype=dtype, skip_memory_check=True, **settings)


def generated(model: Any, device: str = "cpu") -> list[list[int]]:
    mask = (PROMPTS != 0).long().to(device)
    return model.generate(PROMPTS.to(device), attention_mask=mask, **GREEDY).tolist()


def train(host: hz.HostModel, name: str) -> None:
    host.train_step([zoo.batch(name)], lr=1e-2)


def is_untouched(host: hz.HostModel) -> bool:
    model = host.skeleton.model
    return model.training and all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_generates_what_transformers_does(name: str, dtype: str) -> None:
    plain = zoo.build(name, getattr(torch, dtype)).eval()
    host = host_of(name, dtype)
    with resident(host) as model:
        assert generated(model) == generated(plain)
        assert model.tie_weights is not None and not model.training
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == plain.config.tie_word_embeddings
    assert is_untouched(host)
    train(host, name)
    with resident(host) as model:  # of the new weights, whose update had been deferred
        assert not host.engine.has_pending
        plain.load_state_dict(dict(host.named_parameters()), strict=False)  # rounds them
        assert generated(model) == generated(plain)


def test_on_the_cpu_the_store_itself_is_used() -> None:
    host = host_of("qwen3", "bfloat16")
    spans = [(run.data_ptr(), run.data_ptr() + run.nbytes) for run in host.store._runs["weights"]]
    with resident(host) as model:
        for name, parameter in model.named_parameters():
            start = parameter.data_ptr()
            assert any(low <= start and start + parameter.nbytes <= high for low, high in spans), name
        bound = dict(model.named_parameters())
        assert all(weight.data_ptr() == bound[name].data_ptr() for name, weight in named_weights(host))


def test_fp32_parameters_of_a_bf16_model_keep_their_dtype() -> None:
    host = host_of("hunyuan_v1_moe", "bfloat16")
    assert host.kept_in_fp32
    masters = dict(host.named_parameters())
    with resident(host) as model:
        bound, fed = dict(model.named_parameters()), dict(named_weights(host))
        for name in host.kept_in_fp32:
            assert torch.equal(bound[name], masters[name]) and torch.equal(fed[name], masters[name])


def test_generating_changes_no_later_step() -> None:
    trained = {}
    for generates in (False, True):
        host = host_of("llama", "bfloat16", seed=3)
        train(host, "llama")
        if generates:
            with resident(host) as model:
                generated(model)
                model.to(torch.float64)  # TRL casts the model for continuous batching
        train(host, "llama")
        trained[generates] = bytes_of(host)
    assert same(trained[True], trained[False])


def test_an_error_leaves_nothing_behind() -> None:
    host = host_of("gemma3_text")
    buffers = {name: value for name, value in host.skeleton.model.named_buffers()}
    with pytest.raises(RuntimeError, match="in a reward"), resident(host) as model:
        model.to(torch.bfloat16)
        raise RuntimeError("in a reward")
    assert is_untouched(host)
    assert all(value is buffers[name] for name, value in host.skeleton.model.named_buffers())


def test_training_meanwhile_is_reported() -> None:
    host = host_of("llama")
    said = "was trained while it generated: 0 steps done at first, 1 now"
    with pytest.raises(ConfigError, match=said), resident(host):
        train(host, "llama")
    assert is_untouched(host)


def test_continuous_batching() -> None:
    host, prompts = host_of("llama"), [[7, 8, 9], [4, 5, 6, 7, 8]]
    with resident(host) as model:
        outputs = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(**GREEDY),
            continuous_batching_config=ContinuousBatchingConfig(
                max_memory_percent=0.02, max_batch_tokens=256
            ),
            progress_bar=False,
        )
        wanted = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    assert [output.generated_tokens for output in outputs.values()] == wanted
    assert is_untouched(host)


def test_a_copy_on_another_device(emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = zoo.build("qwen3", torch.bfloat16).eval()
    wanted = generated(plain)
    host = host_of("qwen3", "bfloat16", device="cuda")
    monkeypatch.setattr("horizon_lm.trainers.generation.check_device_memory", lambda host: None)
    spans = [(run.data_ptr(), run.data_ptr() + run.nbytes) for run in host.store._runs["weights"]]
    with resident(host) as model:
        copies = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
        starts = [parameter.data_ptr() for parameter in model.parameters()]
        assert not any(low <= start < high for start in starts for low, high in spans)
        assert sum({s._cdata: s.nbytes() for s in (ref() for ref in copies)}.values()) <= copy_bytes(host)
        assert generated(model, "cuda") == wanted
    gc.collect()
    assert is_untouched(host) and not any(ref() for ref in copies)

    with pytest.raises(RuntimeError) as caught, resident(host) as model:
        copies = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
        raise RuntimeError("in a reward")
    gc.collect()
    assert is_untouched(host) and not any(ref() for ref in copies)
    assert caught.tb is not None  # the traceback is alive, and does not hold the copy

    alive: list[weakref.ref] = []
    for _, weight in named_weights(host):
        assert not any(ref() is not None for ref in alive), "two weights at once"
        alive.append(weakref.ref(weight.untyped_storage()))
        del weight


def test_memory_is_checked_before_anything_is_copied() -> None:
    host = host_of("hunyuan_v1_moe", "bfloat16")
    needed = copy_bytes(host)
    parameters = [p for unit in host.skeleton.units for p in unit.parameters]
    least = sum(p.numel * p.compute_dtype.itemsize for p in parameters)
    assert least <= needed < 1.5 * least  # gaps between parameters, and residuals of the wide ones
    check_device_memory(host, needed)
    with pytest.raises(DoesNotFitError, match="generation needs all weights on the device") as caught:
        check_device_memory(host, needed - 1)
    assert "short by 1 byte" in str(caught.value) and "use_vllm=True" in str(caught.value.hint)
