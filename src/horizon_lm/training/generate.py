"""Text generation and chat with a trained model, through transformers' own `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horizon_lm.checkpoint.adapted import base_here
from horizon_lm.checkpoint.identify import has_adapter, identify, may_be_on_hub, no_model
from horizon_lm.data.chat import ChatTemplate
from horizon_lm.data.encode import special_around
from horizon_lm.data.picture_rows import MARK, picture_message
from horizon_lm.data.pictures import Opened, Picture, open_picture, picture_of
from horizon_lm.data.processor import Processor, load_processor
from horizon_lm.data.tokenizer import load_tokenizer
from horizon_lm.errors import ConfigError, DataError, HorizonError
from horizon_lm.io import files
from horizon_lm.machine.device import resolve_device
from horizon_lm.machine.libraries import load_peft
from horizon_lm.model.adapter_files import read_adapter_config
from horizon_lm.model.adapters import check_reads_nothing_else
from horizon_lm.model.configuration import reason_of
from horizon_lm.model.pretrained import TO_GENERATE, quiet_transformers, read_pretrained
from horizon_lm.words import count, size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_PROMPTS = 64_000_000  # bytes of a file of prompts


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. The same seed and prompt give the same text."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Generator:
    """A whole model on one device, its tokenizer and, of a vision-language model, its processor."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        processor: Processor | None = None,
    ) -> None:
        self._model, self.tokenizer, self.device, self.processor = model, tokenizer, device, processor
        self._no_processor: ConfigError | None = None  # why it could not be loaded

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        verb: str = "generate",
    ) -> Generator:
        """Load a Hugging Face folder or name, or the model of a run's folder.

        device: "auto" is the GPU if the weights take less than half of its free memory. verb: the command
        that asks, for errors. Raises ConfigError, and DataError if weights are missing.
        """
        place = model_folder(source, verb)
        tokenizer = load_tokenizer(str(place), trust_remote_code=trust_remote_code, key="model")
        adapter = Path(place) if has_adapter(Path(place)) else None
        weights = str(place) if adapter is None else base_here(adapter)
        options: dict[str, Any] = {"local_files_only": Path(weights).is_dir()}
        revision = None if adapter is None else read_adapter_config(str(adapter)).revision
        if revision and not options["local_files_only"]:
            options["revision"] = revision
        processor, problem = None, None
        try:
            with quiet_transformers():
                processor = load_processor(str(place), tokenizer, trust_remote_code=trust_remote_code)
        except ConfigError as error:  # text needs none
            problem = error
        try:
            with quiet_transformers():
                model: Any = read_pretrained(
                    weights,
                    TO_GENERATE,
                    dtype="auto",
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    **options,
                )
                if adapter is not None:
                    model = _with_adapter(model, adapter)
        except HorizonError:
            raise
        except Exception as error:  # transformers raises many kinds of errors
            raise ConfigError(
                f"no model could be loaded from {source}: {reason_of(error)}",
                hint="pass a folder in Hugging Face format or a run's output_dir",
            ) from error
        chosen = _device_for(model, device)
        made = cls(model.to(chosen).eval(), tokenizer, chosen, processor)
        made._no_processor = problem
        return made

    def pictures(self, files: Sequence[str]) -> list[Opened]:
        """Read pictures for a prompt. Raises ConfigError for a model of text alone, and DataError."""
        if files and self._no_processor is not None:
            raise self._no_processor
        if files and self.processor is None:
            raise ConfigError(
                f"a {self._model.config.model_type} model takes no pictures: it is text-only, or has "
                "no processor",
                hint="leave out --image, or use a vision-language model",
            )
        try:
            return [open_picture(picture_of(file, Path.cwd(), "--image"), "--image") for file in files]
        except DataError as error:
            raise DataError(error.message, hint="pass a file that PIL can read, as --image FILE") from error

    def complete(
        self,
        prompt: str,
        sampling: Sampling,
        *,
        special_tokens: bool = True,
        on_text: Callable[[str], None] | None = None,
        pictures: Sequence[Opened] = (),
    ) -> str:
        """Complete `prompt`. `on_text` gets the completion piece by piece.

        special_tokens: let the tokenizer add its own; False for a prompt made by a chat template. pictures:
        at the marks of the processor, or at <image> marks, or before the prompt.
        """
        if pictures:
            ids = self._with_placeholders(prompt, pictures, special_tokens=special_tokens)
        else:
            ids = self.tokenizer(prompt, add_special_tokens=special_tokens).input_ids
        ids = ids or [self.tokenizer.eos_token_id]  # an empty prompt: a new document
        return self.complete_tokens(ids, sampling, on_text=on_text, pictures=pictures)

    def _with_placeholders(
        self, prompt: str, pictures: Sequence[Opened], *, special_tokens: bool
    ) -> list[int]:
        assert self.processor is not None
        mark = self.processor.mark
        if mark not in prompt:
            prompt = prompt.replace(MARK, mark) if MARK in prompt else mark * len(pictures) + prompt
        ids = self.processor.tokens(prompt, pictures, "the prompt").ids
        return [*special_around(self.tokenizer)[0], *ids] if special_tokens else ids

    def complete_tokens(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        pictures: Sequence[Opened] = (),
    ) -> str:
        """Complete a prompt of tokens, which has the placeholders of its pictures."""
        rows = int(self._model.get_input_embeddings().weight.shape[0])
        placeholder = getattr(self._model.config, "image_token_id", None) if pictures else None
        largest = max((token for token in ids if token != placeholder), default=0)
        if largest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"the prompt has token {largest} ({token!r}), and the model's embeddings have "
                f"{count(rows, 'row')}",
                hint="use the tokenizer that the model was trained with",
            )
        inputs = torch.tensor([list(ids)], device=self.device)
        draw: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        with torch.inference_mode(), torch.random.fork_rng(), _cannot_write(self._model):
            torch.manual_seed(sampling.seed)
            output = self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **self._seen(inputs, pictures),
                max_new_tokens=sampling.max_new_tokens,
                repetition_penalty=sampling.repetition_penalty,
                num_beams=1,  # generation_config.json may ask for 10^9, and a streamer supports one
                num_return_sequences=1,
                pad_token_id=self.tokenizer.eos_token_id,
                eos_token_id=self._stops(),
                streamer=_streamer(self.tokenizer, on_text),
                **draw,
            )
        return str(self.tokenizer.decode(output[0, inputs.shape[1] :].tolist(), skip_special_tokens=True))

    def _seen(self, ids: torch.Tensor, pictures: Sequence[Opened]) -> dict[str, torch.Tensor]:
        """Return the inputs of a prompt with pictures besides its tokens."""
        if not pictures or self.processor is None:
            return {}
        found = self.processor.inputs(*pictures)
        if self.processor.types is not None:
            name, tokens = self.processor.types
            found[name] = torch.isin(ids, torch.tensor(tokens, device=ids.device)).long()
        dtype = self._model.dtype
        return {n: t.to(self.device, dtype if t.is_floating_point() else None) for n, t in found.items()}

    def _stops(self) -> list[int]:
        """Return the tokens that end a text: the model's, the tokenizer's, and a chat's end of turn."""
        named = self._model.generation_config.eos_token_id
        stops = set(named if isinstance(named, list) else [named]) | {self.tokenizer.eos_token_id}
        known = self.tokenizer.get_added_vocab()
        template = str(self.tokenizer.chat_template or "")
        stops |= {known[mark] for mark in _END_OF_TURN if mark in known and mark in template}
        return sorted(stop for stop in stops if stop is not None)


def _with_adapter(model: Any, folder: Path) -> Any:
    """Put a saved adapter into its base. Raises ConfigError, DataError, UnsupportedModelError."""
    check_reads_nothing_else(read_adapter_config(str(folder)))
    with warnings.catch_warnings():
        # PEFT would go on with random values in their place.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return load_peft().PeftModel.from_pretrained(model, str(folder), use_safetensors=True)


@contextmanager
def _cannot_write(model: Any) -> Iterator[None]:
    """Turn what transformers raises for invalid values of its configuration files into ConfigError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"a {type(model).__name__} cannot generate by its configuration: {reason_of(error)}",
            hint="check config.json and generation_config.json of the model",
        ) from error


_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")


class Chat:
    """A conversation; `reset` forgets its messages."""

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        self._generator = generator
        try:
            self._template = ChatTemplate(generator.tokenizer, processor=generator.processor)
        except DataError as error:
            raise ConfigError(
                "the tokenizer of this model has no chat template",
                hint="use horizon generate, which needs no template; a tuned model keeps its own",
            ) from error
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self._pictures: list[Opened] = []

    def reset(self) -> None:
        self.messages, self._pictures = [], []

    def say(
        self,
        text: str,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        images: Sequence[str] = (),
    ) -> str:
        """Return the model's answer to `text` and add both to the conversation. images: files of pictures."""
        pictures = [*self._pictures, *self._generator.pictures(images)]
        asked = [*self.messages, picture_message(text, len(images))]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self._template.prompt([*system, *asked], [Picture("")] * len(pictures))
        answer = self._generator.complete(
            prompt, sampling, special_tokens=False, on_text=on_text, pictures=pictures
        ).strip()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self._pictures = pictures
        return answer


def model_folder(source: str | Path, verb: str = "generate") -> str | Path:
    """Return the folder of the model in `source`, which may be a run; a Hub name stays as it is.

    Raises ConfigError, with what is there instead, if there is no model. verb: the command that asks.
    """
    looked = identify(source)
    if looked.model is not None:
        return looked.model
    name = str(source)
    if looked.kind == "absent" and not name.startswith((".", "/", "~")) and may_be_on_hub(name):
        return source
    raise no_model(looked, verb)


def _device_for(model: Any, device: str | torch.device) -> torch.device:
    if isinstance(device, torch.device):
        wanted = device
    else:
        wanted = resolve_device(device)
        if device != "auto":
            return wanted
    if wanted.type != "cuda":
        return wanted
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return wanted if 2 * size < torch.cuda.mem_get_info(wanted)[0] else torch.device("cpu")


def _streamer(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    """Wrap `on_text` in transformers' streamer, which holds back text that may still change."""
    if on_text is None:
        return None
    write = on_text
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def prompts_of(texts: Sequence[str]) -> list[str]:
    """Return prompts from the command line; `@FILE` means the lines of a file. Raises ConfigError."""
    prompts: list[str] = []
    for text in texts:
        if not text.startswith("@"):
            prompts.append(text)
            continue
        try:
            content = files.read_stream(Path(text[1:]).expanduser(), _LARGEST_PROMPTS + 1)
            lines = content.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{text[1:]} cannot be read: {error}", hint="pass --prompt @FILE, with one prompt per line"
            ) from error
        if len(content) > _LARGEST_PROMPTS:
            raise ConfigError(
                f"{text[1:]} is larger than {size(_LARGEST_PROMPTS)}",
                hint="split the file; --prompt @FILE reads one prompt per line",
            )
        prompts += [line for line in lines if line.strip()]
    return prompts
