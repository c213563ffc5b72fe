"""Part 3: one step under PyTorch's CUDA sanitizer, which reports accesses that nothing orders.

The sanitizer listens through a dispatch mode, and dispatch modes belong to a thread: by itself it
sees only the main thread, that is nothing of our lanes. Here each lane enters the mode. Negative
controls run the same step with the wait of one stream dropped, and say which of them it saw.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.common import Part, Place

MARK = "sanitizer-result: "
CONTROLS = (("F", "U"), ("U", "F"), ("B", "U"), ("U", "B"), ("D", "B"), ("B", "D"))


def check_sanitizer(place: Place) -> Part:
    part = Part("sanitizer")
    if place.dry:
        why = "it watches CUDA alone; tests/engine/test_cuda_lanes_logic.py runs its analysis on the CPU"
        part.add("sanitizer", None, why)
        return part
    here = Path(__file__).resolve().parent
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(here / "check.py"), "--sanitized-child"]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        part.add("one step", False, "the sanitized process did not end within 400 s")
        return part
    lines = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        tail = "\n".join((child.stdout + child.stderr).splitlines()[-15:])
        part.add("one step", False, f"the sanitized process ended with {child.returncode}")
        part.note(tail)
        return part
    result = json.loads(lines[-1][len(MARK) :])
    part.data = result
    clean = result["clean"]
    passed = clean["reports"] == 0 and not clean["error"]
    part.add("one step, two micro-batches", passed, clean["error"], **_cells(clean))
    for text in clean["texts"]:
        part.note(text)
    # Without this, "no report" would say nothing.
    part.add("accesses in the lanes' streams are seen", clean["launches_in_streams"] > 100, **_cells(clean))
    seen = 0
    for control in result["controls"]:
        caught = control["reports"] > 0
        seen += caught
        what = "reported" if caught else "not reported"
        part.add(f"without {control['dropped']}", None, control["error"], sanitizer=what)
    part.note(
        f"negative controls: the sanitizer saw {seen} of {len(result['controls'])} dropped waits. It takes "
        "an event that any thread waits for as one that all streams wait for, so it may miss some;"
    )
    part.note("tests/engine/test_cuda_lanes_logic.py drops every wait in turn, and all are seen there.")
    why = "" if seen else "the sanitizer is blind to this pattern"
    part.add("at least one dropped wait is seen", seen > 0, why, seen=seen, dropped=len(result["controls"]))
    return part


def _cells(run: dict[str, Any]) -> dict[str, Any]:
    return {"reports": run["reports"], "launches_in_streams": run["launches_in_streams"]}


# In the child process.


def run_sanitized() -> None:
    """Run the steps under the sanitizer and print the result as one line of JSON."""
    import torch

    import horizon_lm as hz
    import zoo
    from horizon_lm.schedule import Lane

    watch = _Watch()
    # Only the lanes are watched: the main thread builds models, which the mode would make slow.
    watch.disable_main_thread()
    model = hz.HostModel.from_pretrained(
        zoo.build("llama"), device="cuda", dtype="float32", skip_memory_check=True
    )
    batches = [zoo.batch("llama", seed=seed) for seed in range(2)]
    model.forward_backward(batches)  # memory and libraries are set up before anything is watched
    model.step(lr=1e-3, max_grad_norm=1.0)
    result: dict[str, Any] = {"clean": watch.step(model, batches), "controls": []}
    schedules, key = model.engine._schedules, (model.engine.spec(2), True)
    honest = schedules[key]
    ops, waits = honest.ops, honest.waits
    for kind, other in CONTROLS:
        streams = (Lane.UPLOAD, Lane.COMPUTE, Lane.DOWNLOAD)
        pairs = [(i, j) for i, targets in enumerate(waits) for j in targets if ops[i].lane in streams]
        pairs = [(i, j) for i, j in pairs if (ops[i].kind, ops[j].kind) == (kind, other)]
        if not pairs:
            continue
        later, earlier = pairs[len(pairs) // 2]
        fewer = list(waits)
        fewer[later] = tuple(j for j in waits[later] if j != earlier)
        schedules[key] = honest._replace(waits=fewer)
        with _issued_in_order(later, earlier):
            found = watch.step(model, batches)
        schedules[key] = honest
        dropped = f"{ops[later]}'s wait for {ops[earlier]}"
        result["controls"].append(found | {"dropped": dropped, "texts": []})
    torch.cuda.synchronize()
    print(MARK + json.dumps(result), flush=True)


@contextmanager
def _issued_in_order(later: int, earlier: int) -> Iterator[None]:
    """Drop the wait of the stream alone: the thread still issues the one op after the other."""
    from horizon_lm.engine import lanes

    real = lanes._CudaRun._wait_for

    def wait(run: Any, i: int, stream: Any) -> bool:
        if i == later and earlier in run.issued:
            run.issued[earlier].wait()
        return real(run, i, stream)

    lanes._CudaRun._wait_for = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        lanes._CudaRun._wait_for = real  # type: ignore[method-assign]


class _Watch:
    """The sanitizer of TORCH_CUDA_SANITIZER=1, made to listen in threads and to be safe in them."""

    def __init__(self) -> None:
        from torch.cuda import _gpu_trace
        from torch.cuda._sanitizer import cuda_sanitizer
        from torch.utils._python_dispatch import TorchDispatchMode

        assert cuda_sanitizer.enabled, "TORCH_CUDA_SANITIZER was not set when torch was imported"
        self._sanitizer = cuda_sanitizer
        lock = threading.RLock()

        def locked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                with lock:
                    return function(*args)

            return call

        for value in vars(_gpu_trace).values():
            if hasattr(value, "callback_list"):
                value.callback_list[:] = [locked(callback) for callback in value.callback_list]
        handler = cuda_sanitizer.dispatch.event_handler
        launch = locked(handler._handle_kernel_launch)
        self.launches_in_streams = 0

        def count(stream: int, *args: Any) -> Any:
            self.launches_in_streams += stream != 0 and bool(args[0] or args[1])
            return launch(stream, *args)

        handler._handle_kernel_launch = count
        shared = cuda_sanitizer.dispatch

        class LaneMode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return shared.__torch_dispatch__(func, types, args, kwargs)

        self._mode = LaneMode

    def disable_main_thread(self) -> None:
        self._sanitizer.disable()

    def step(self, model: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """One step with all lanes watched: number of reports, their texts, launches seen."""
        import torch
        from torch.cuda._sanitizer import CUDASanitizerErrors

        from horizon_lm.engine import lanes

        real = lanes._CudaRun._lane
        mode = self._mode

        def lane(run: Any, name: Any, mine: list[int]) -> None:
            with mode():
                real(run, name, mine)

        lanes._CudaRun._lane = lane  # type: ignore[method-assign]
        self.launches_in_streams = 0
        reports, texts, error = 0, [], ""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model.forward_backward(batches)
                model.step(lr=1e-3, max_grad_norm=1.0)
        except CUDASanitizerErrors as found:
            reports = len(found.errors)
            texts = [" / ".join(str(e).splitlines()[1:4]) for e in found.errors[:3]]
        except Exception as other:
            error = f"{type(other).__name__}: {other}".splitlines()[0]
        finally:
            lanes._CudaRun._lane = real  # type: ignore[method-assign]
            torch.cuda.synchronize()
        seen = self.launches_in_streams
        return {"reports": reports, "texts": texts, "error": error, "launches_in_streams": seen}
