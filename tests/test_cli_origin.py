"""A new run's weights, tokenizer and texts agree about what an id means; no option is passed over."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import CONFIG, write_export
from relora_opt_cli import run as rooms
from relora_opt_cli.checkpoint import checkpoints
from relora_opt_cli.config import Config
from relora_opt_cli.config_file import load_config_file
from relora_opt_cli.corpus import Settings, tokenize, train_tokenizer
from relora_opt_cli.errors import UserError
from relora_opt_cli.evaluate import evaluate
from relora_opt_cli.export import export_run
from relora_opt_cli.origin import agreed
from relora_opt_cli.parallel import World
from relora_opt_cli.resolution import resolve
from relora_opt_cli.run import new_run
from relora_opt_cli.tokens import fit_tokenizer
from relora_opt_cli.train import resume_run
from safetensors.torch import load_file, save_file
from tiny import options, rows, train, write_texts
from tokenizer import END, byte_tokenizer
from tokenizers import processors


@pytest.fixture(autouse=True)
def _quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """A model, its tokenizer, another one of as many tokens, and texts: as they are, and tokenized by either."""
    texts, other, model = tmp_path / "texts", tmp_path / "other.json", tmp_path / "model"
    write_texts(texts)
    write_export(model, replace(CONFIG, max_position_embeddings=16))
    fit_tokenizer([], vocab_size=257).save(str(other))
    tokenize([str(texts)], Settings(tokenizer=model, val_share=0.3), tmp_path / "own")
    tokenize([str(texts)], Settings(tokenizer=other, val_share=0.3), tmp_path / "foreign")
    named = {"own_tokenizer": model / "tokenizer.json", "other": other, "own": tmp_path / "own"}
    return {"texts": str(texts), "model": str(model), "foreign": str(tmp_path / "foreign"), **_texts(named)}


def _texts(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def settled(places: dict[str, str], **given: Any) -> Config:
    """Return what a run with some options has; places go by their names."""
    return agreed(resolve({name: places.get(value, value) for name, value in given.items()}), vocab_size=1000)


def test_ids_of_another_tokenizer_than_the_models_are_refused_before_anything_is_written(
    tmp_path: Path, places: dict[str, str]
) -> None:
    def begin(**changes: Any) -> None:
        new_run(resolve(options(tmp_path, model=None, vocab_size=None, init_from=places["model"], **changes)), World())

    with pytest.raises(UserError, match=r"tokenizer='.*other.json' is not the one of init_from='.*model', .*: leave"):
        begin(tokenizer=places["other"])
    with pytest.raises(
        UserError, match=r"data='.*foreign' was tokenized by another .* of init_from='.*model': .* --tokenizer .*model/"
    ):
        begin(data=[places["foreign"]])
    assert not (tmp_path / "run").exists()
    begin(tokenizer=places["own_tokenizer"])
    begin(data=[places["own"]])


@pytest.mark.parametrize(
    "given",
    [
        {"init_from": "model", "data": "texts"},
        {"init_from": "model", "data": "own"},
        {"tokenizer": "other", "data": "texts"},
        {"data": "foreign"},
    ],
    ids=str,
)
def test_a_size_of_vocabulary_is_refused_where_none_is_trained_and_it_is_another(
    places: dict[str, str], given: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"vocab_size=300, but the tokenizer '.*' has 257 tokens: leave out vocab_size"):
        settled(places, **given, vocab_size=300)
    assert settled(places, **given).vocab_size is None
    assert settled(places, **given, vocab_size=257).vocab_size == 257


def test_a_size_of_vocabulary_above_the_models_is_refused_before_texts_are_read(places: dict[str, str]) -> None:
    shape = str(Path(places["model"]) / "config.json")
    with pytest.raises(UserError, match=r"tokenizer has 1001 tokens, and the model embeddings for vocab_size=1000:"):
        settled(places, data="texts", model=shape, vocab_size=1001)
    assert settled(places, data="texts", model=shape, vocab_size=1000).vocab_size == 1000
    assert settled(places, data="texts", preset="5m", vocab_size=1001).vocab_size == 1001


def test_what_is_tokenized_is_not_tokenized_again(tmp_path: Path, places: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"data='.*own' is tokenized already: give texts, or give it to pretrain"):
        tokenize([places["own"]], Settings(), tmp_path / "again")
    with pytest.raises(UserError, match=r"data='.*own' is tokenized already"):
        train_tokenizer([places["texts"], places["own"]], Settings())


@pytest.mark.parametrize(("name", "value"), [("text_field", "text"), ("val_share", 0.3), ("allow_lossy", True)])
def test_options_of_texts_are_refused_beside_tokens(places: dict[str, str], name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name}={value!r} is of texts, and data='.*own' is tokenized .*: leave it"):
        settled(places, data="own", **{name: value})
    assert getattr(settled(places, data="texts", tokenizer="other", **{name: value}), name) == value


def test_what_is_recorded_is_what_counted(places: dict[str, str]) -> None:
    config = settled(places, data="texts")
    assert (config.vocab_size, config.text_field, config.val_share) == (1000, "text", 0.05)
    assert settled(places, data="texts", vocab_size=300).vocab_size == 300
    config = settled(places, data="own")
    assert (config.vocab_size, config.text_field, config.val_share) == (None, None, None)


def test_the_options_of_a_run_on_tokens_begin_another_one(tmp_path: Path, places: dict[str, str]) -> None:
    run = train(tmp_path, data=[places["own"]], vocab_size=None)
    written = load_config_file(run / "config.toml")
    assert not {"vocab_size", "text_field", "val_share"} & set(written)
    new_run(resolve({**written, "out": str(tmp_path / "again")}), World())
    with pytest.raises(UserError, match=r"text_field='body' is of texts, and data='.*own' is tokenized already"):
        resume_run(run, {"steps": 22, "text_field": "body"})
    resume_run(run, {"steps": 22})
    assert rows(run)[-1].update == 22


@pytest.mark.parametrize(
    "given",
    [
        {"data": "own", "vocab_size": 300, "val_share": 0.1, "text_field": "body"},
        {"data": "texts", "vocab_size": 300, "model": None, "init_from": "model", "tokenizer": "other"},
    ],
    ids=["tokens", "weights"],
)
def test_a_run_that_was_begun_with_options_that_did_not_count_goes_on(
    tmp_path: Path, places: dict[str, str], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(rooms, "agreed", lambda config, *, vocab_size: config)
        run = train(tmp_path, **{name: places.get(value, value) for name, value in given.items()})
    assert load_config_file(run / "config.toml")["vocab_size"] == 300
    resume_run(run, {"steps": 22})
    assert rows(run)[-1].update == 22


def test_a_run_or_a_checkpoint_of_it_is_gone_on_from(tmp_path: Path) -> None:
    first = train(tmp_path)
    earlier, last = checkpoints(first)
    for given, found in ((first, last), (earlier, earlier), (first / "export", first / "export")):
        changes = {"model": None, "init_from": str(given), "out": str(tmp_path / "second")}
        run = new_run(resolve(options(tmp_path, **changes)), World())
        weights = load_file(found / "model.safetensors")
        assert run.config.init_from == str(found)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())
    (earlier / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors"):
        new_run(resolve(options(tmp_path, model=None, init_from=str(earlier), out=str(tmp_path / "third"))), World())


def test_a_run_goes_on_and_is_evaluated_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"data": ["texts"], "model": "shape.json", "out": "run"}
    (tmp_path / "there").mkdir()
    options(tmp_path)
    monkeypatch.chdir(tmp_path)
    train(tmp_path, **given)
    assert load_config_file("run/config.toml")["data"] == [str(tmp_path / "texts")]
    shutil.copytree("texts", "there/copy")
    monkeypatch.chdir(tmp_path / "there")
    resume_run(Path("../run"), {"steps": 22})
    assert evaluate(Path("../run")).num_documents > 0
    resume_run(Path("../run"), {"steps": 24, "data": ["copy"]})
    monkeypatch.chdir(tmp_path)
    assert load_config_file("run/config.toml")["data"] == [str(tmp_path / "there" / "copy")]
    assert evaluate(Path("run")).num_documents > 0


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(
    tmp_path: Path, places: dict[str, str], value: float
) -> None:
    file = Path(places["model"]) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = value
    save_file(weights, file)
    with pytest.raises(
        UserError, match=r"^/.*/model holds nan or infinity in 'model\.norm\.weight': give weights that are"
    ):
        begun(tmp_path, init_from=places["model"], data=[places["own"]])
    assert not (tmp_path / "run").exists()


def two_ends(folder: Path, ends: int | tuple[int, ...] = 257) -> Path:
    """Write a model that ends its texts with "</s>", and whose tokenizer has "<|endoftext|>" as well."""
    write_export(folder, replace(CONFIG, vocab_size=258, eos_token_id=ends, max_position_embeddings=16))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def begun(tmp_path: Path, **changes: Any) -> rooms.Run:
    return new_run(resolve(options(tmp_path, vocab_size=None, **{"model": None, **changes})), World())


def test_texts_end_with_what_the_weights_have_learned_as_their_end(tmp_path: Path) -> None:
    model = two_ends(tmp_path / "model")
    run = begun(tmp_path, init_from=str(model))
    assert (run.corpus.eos_id, run.model.config.eos_token_id) == (257, 257)
    assert (run.corpus.train == 257).any()
    assert not (run.corpus.train == END).any()
    usual = begun(tmp_path, tokenizer=str(model / "tokenizer.json"), model=str(model / "config.json"))
    assert usual.corpus.eos_id == 257  # the model's, which lies beside it
    alone = shutil.copy(model / "tokenizer.json", tmp_path / "alone.json")
    assert begun(tmp_path, tokenizer=str(alone), model=str(model / "config.json")).corpus.eos_id == END


def test_tokens_with_another_end_than_the_weights_have_learned_are_refused(tmp_path: Path) -> None:
    model = two_ends(tmp_path / "model")
    alone = shutil.copy(model / "tokenizer.json", tmp_path / "alone.json")
    write_texts(tmp_path / "texts")
    for name, tokenizer in (("other", alone), ("own", model)):
        tokenize([str(tmp_path / "texts")], Settings(tokenizer=tokenizer, val_share=0.3), tmp_path / name)
    begun(tmp_path, init_from=str(model), data=[str(tmp_path / "own")])
    with pytest.raises(
        UserError, match=r"end with token 256 \('<|endoftext|>'\), and those of init_from='.*model' with token 257"
    ):
        begun(tmp_path, init_from=str(model), data=[str(tmp_path / "other")])


def test_a_shape_without_weights_ends_texts_as_its_tokenizer_does(tmp_path: Path) -> None:
    given = options(tmp_path)
    shape = json.loads(Path(given["model"]).read_text())
    Path(given["model"]).write_text(json.dumps({**shape, "bos_token_id": 1, "eos_token_id": [2, 3]}))
    run = new_run(resolve(given), World())
    assert run.model.config.eos_token_id == run.corpus.eos_id == run.corpus.tokenizer.token_to_id("<|endoftext|>")
    assert run.model.config.bos_token_id is None


def test_a_run_from_scratch_puts_no_token_before_a_text_that_training_does_not_put_there(tmp_path: Path) -> None:
    model = write_export(tmp_path / "model", replace(CONFIG, vocab_size=258, max_position_embeddings=16))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(model / "tokenizer.json"))
    scratch = begun(tmp_path, tokenizer=str(model), model=str(model / "config.json"))
    assert scratch.corpus.tokenizer.encode("a").ids == byte_tokenizer().encode("a").ids
    learned = begun(tmp_path, init_from=str(model))
    assert learned.corpus.tokenizer.encode("a").ids[0] == 257  # its weights know it
    assert (learned.corpus.train == scratch.corpus.train).all()


@pytest.mark.parametrize("out", [".", "run", "runs/a"])
def test_a_run_in_the_folder_of_its_texts_is_refused(tmp_path: Path, out: str) -> None:
    texts = write_texts(tmp_path / "texts")
    (tmp_path / "link").symlink_to(texts)
    for data in (texts, tmp_path / "link"):
        given = resolve(options(tmp_path, data=[str(data)], out=str(texts / out)))
        with pytest.raises(UserError, match=r"out='.*' lies in data='.*', so that what the run writes would be read"):
            new_run(given, World())


TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"


def chat_model(folder: Path) -> Path:
    """Write a model as transformers does, whose tokenizer has a chat template, and tokens to begin and to pad with."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["</s>", "<s>", "<pad>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)
    fast.save_pretrained(folder)
    ids = {"bos_token_id": 258, "eos_token_id": 257, "pad_token_id": 259}
    shape = {key: value for key, value in CONFIG.to_dict().items() if not key.endswith("_id")}
    shape |= {"vocab_size": 260, "max_position_embeddings": 16, **ids}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


def check_chat(export: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    message = {"role": "user", "content": "hello"}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "user: hello</s>"
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (258, 257, 259)
    assert (model.generation_config.temperature, model.generation_config.pad_token_id) == (0.7, 259)


def test_what_transformers_knows_of_a_model_is_in_the_exports_of_a_run_that_goes_on_from_it(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    run = train(tmp_path, model=None, vocab_size=None, init_from=str(model))
    shutil.rmtree(model)
    check_chat(run / "export")
    check_chat(export_run(checkpoints(run)[0], tmp_path / "earlier"))
    check_chat(
        train(tmp_path, model=None, vocab_size=None, init_from=str(run), out=str(tmp_path / "second")) / "export"
    )
    resume_run(run, {"steps": 22})
    check_chat(run / "export")


def test_a_run_that_kept_nothing_of_the_model_is_exported(tmp_path: Path) -> None:
    run = train(tmp_path, model=None, vocab_size=None, init_from=str(chat_model(tmp_path / "model")))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (run / name).unlink()
    export = export_run(run, tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(export).eos_token == "</s>"
    assert transformers.AutoModelForCausalLM.from_pretrained(export).generation_config.pad_token_id == 259


def test_the_end_in_an_export_is_the_one_that_the_texts_have(tmp_path: Path) -> None:
    model = two_ends(tmp_path / "model", (257, END))
    run = train(tmp_path, model=None, vocab_size=None, init_from=str(model))
    assert transformers.AutoTokenizer.from_pretrained(run / "export").eos_token == "<|endoftext|>"
    (run / "tokenizer_config.json").unlink()
    assert transformers.AutoTokenizer.from_pretrained(export_run(run, tmp_path / "again")).eos_token == "<|endoftext|>"
