"""The verbs that try a model: `horizon eval`, `horizon generate`, `horizon chat`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from horizon_lm.cli.run import SettingsArguments, SettingsCommand, split_arguments
from horizon_lm.errors import ConfigError, HorizonError
from horizon_lm.io.hub import require_model
from horizon_lm.text import json_text, shown
from horizon_lm.words import count

if TYPE_CHECKING:
    from horizon_lm.training.generate import Generator

Model = Annotated[
    str, typer.Argument(help="A folder in Hugging Face format, a run's output_dir, or a Hub name.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens of this total share.")
]
Penalty = Annotated[float, typer.Option(min=1, help="Above 1: earlier tokens become less likely.")]
Images = Annotated[
    list[str] | None, typer.Option("--image", metavar="FILE", help="A picture for the prompt. Repeatable.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draw; the same seed gives the same text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that ships with the model.")
]


class EvalCommand(SettingsCommand):
    """`eval`, which takes a run, a model or a configuration, and settings."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[RUN | MODEL | CONFIG.yaml]", "[KEY=VALUE | --KEY VALUE]..."]


def evaluate(
    settings: SettingsArguments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Print loss and perplexity of a model.

    On preferences: loss, reward margin and accuracy.

    RUN: its trained model, or the latest checkpoint of an unfinished run. MODEL: a folder in Hugging Face
    format or a Hub name. CONFIG.yaml, or no file: the model of model_name_or_path.

    Evaluates on eval_datasets, else on what val_size holds out, else on datasets.
    """
    place, overrides = split_arguments(settings or ())
    if place is not None:
        require_model(place, "model")
    for key, _, name in (override.removeprefix("--").partition("=") for override in overrides):
        if key.replace("-", "_") == "model_name_or_path":
            require_model(name, "model_name_or_path")
    from horizon_lm.training.eval_command import evaluate_target, target_of
    from horizon_lm.training.together import joined

    target, notes = target_of(place, overrides)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with joined(target.config.device) as together:
        found = evaluate_target(target, together=together)
    if as_json:
        print(json.dumps(found))
    else:
        shown = [f"loss {found['eval_loss']:.4f}"]
        if "eval_perplexity" in found:
            shown.append(f"perplexity {found['eval_perplexity']:.4f}")
        shown += [
            f"{name} {found[f'eval_rewards/{key}']:.4f}"
            for name, key in (("margin", "margins"), ("accuracy", "accuracies"))
            if f"eval_rewards/{key}" in found
        ]
        print(
            f"{'  '.join(shown)}  "
            f"({count(found['eval_tokens'], 'token')}, {count(found['eval_sequences'], 'sequence')}, "
            f"{found['dtype']}, {found['eval_seconds']:.1f} s)"
        )


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; @FILE: one per line. Repeatable.")],
    as_chat: Annotated[bool, typer.Option("--chat", help="Send it as a user message.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt, with --chat.")] = None,
    image: Images = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
) -> None:
    """Complete prompts with a model.

    Pictures are at the <image> marks of a prompt, or before it.
    """
    require_model(model, "model")
    from horizon_lm.training.generate import Chat, Generator, Sampling, prompts_of

    prompts = prompts_of(prompt)
    generator = Generator.load(model, device=device, trust_remote_code=trust_remote_code)
    files = image or []
    pictures = generator.pictures(files)
    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    for text in prompts:
        write = None if as_json else _write
        if not as_json and len(prompts) > 1:
            print(f"--- {text}")
        if as_chat:
            completion = Chat(generator, system).say(text, sampling, write, files)
        else:
            completion = generator.complete(text, sampling, on_text=write, pictures=pictures)
        print(json_text({"prompt": text, "completion": completion}) if as_json else "")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    image: Images = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model.

    /image FILE shows a picture with the next message; /reset clears the conversation; /quit or the end of
    input exits.
    """
    require_model(model, "model")
    from horizon_lm.training.generate import Chat, Generator, Sampling

    if sys.stdin is None:
        raise ConfigError(
            "chat reads standard input, which is closed", "use horizon generate, which needs none"
        )
    generator = Generator.load(model, device=device, trust_remote_code=trust_remote_code, verb="chat")
    conversation = Chat(generator, system)
    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    is_terminal = sys.stdin.isatty()
    waiting = list(image or [])  # pictures for the next message
    generator.pictures(waiting)
    while True:
        try:
            text = input("you> " if is_terminal else "").strip()
        except EOFError:
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            conversation.reset()
            waiting = []
        elif text.startswith("/image "):
            waiting += _readable(generator, text.removeprefix("/image ").strip())
        elif text:
            print("model> " if is_terminal else "", end="", flush=True)
            conversation.say(text, sampling, _write, waiting)
            waiting = []
            print()


def _readable(generator: Generator, file: str) -> list[str]:
    """Return the file if it is a picture that the model takes; else say why not."""
    try:
        generator.pictures([file])
    except HorizonError as error:
        print(error, file=sys.stderr)
        return []
    return [file]


def _write(text: str) -> None:
    print(shown(text, sys.stdout.encoding), end="", flush=True)
