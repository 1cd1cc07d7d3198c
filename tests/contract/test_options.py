"""No option is ever ignored: a witness for each, typos refused with the right suggestion, runs repeated from a file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from diffsynth.config import GenerateConfig, TrainConfig
from diffsynth.core.command_line import read_command_line
from diffsynth.core.errors import UserError, closest, num_slips
from diffsynth.core.options import read_yaml
from diffsynth.diffusion.optim import build_optimizer
from diffsynth.trainers.generate import generate
from diffsynth.trainers.option_checks import NEEDS, check_inputs, check_options
from diffsynth.trainers.run import load_pipeline_class

from .lora_states import command
from .schemas import commands, sampled_typos, schema_of, schemas, typed_names, typos
from .tiny import FamilyAtWork, process_environment
from .witnesses import WITNESSES, Observer, Refusal, Witness
from .witnesses.lab import Lab

CASES = [(name, witness) for name, listed in WITNESSES.items() for witness in listed]
TYPOS_PER_OPTION = 20
RIGHT_SUGGESTIONS = 0.97


@pytest.fixture(scope="module")
def observe(family: FamilyAtWork, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observer]:
    """Looks at a configuration once for all witnesses that share it."""
    from accelerate.state import AcceleratorState

    yield Observer(Lab(family, tmp_path_factory.mktemp("witnesses")))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", schemas())
def test_every_option_has_one_witness(name):
    witnessed = [witness.option for witness in WITNESSES.get(name, [])]
    missing = sorted(set(schemas()[name].model_fields) - set(witnessed))
    assert not missing, (
        f"{name} has options without a witness: {', '.join(missing)}. Add to tests/contract/witnesses/ for each a "
        "value, and what it changes that a user can see; an option that changes nothing is not to be there.")
    gone = sorted(set(witnessed) - set(schemas()[name].model_fields))
    assert not gone, f"{name} has no such options any more: {', '.join(gone)}"
    assert len(set(witnessed)) == len(witnessed), f"{name} has two witnesses for one option"


def test_every_command_reads_a_known_set_of_options():
    assert {schema_of(entry) for entry in commands().values()} <= set(schemas())
    assert set(WITNESSES) <= set(schemas())


@pytest.mark.parametrize(("name", "witness"), CASES, ids=[f"{name}.{witness.option}" for name, witness in CASES])
def test_option_does_something(family, observe, name: str, witness: Witness):
    """The two sides differ in this option alone, and what is seen of them differs."""
    base, changed = witness.sides(observe.lab)
    differing = {option for option in base.keys() | changed.keys() if base.get(option, ...) != changed.get(option, ...)}
    assert differing == {witness.option}
    seen = [_seen(observe(witness.look, options), witness) for options in (base, changed)]
    assert seen[0] != seen[1], f"{witness.option} = {changed[witness.option]!r} changes nothing"


def _seen(result: object, witness: Witness) -> object:
    if isinstance(result, Refusal):
        assert re.search(witness.refused or "$not", result.message), result.message
        return result.message
    return witness.seen(result)


LOOKS = {witness.look: witness for _, witness in reversed(CASES)}


@pytest.mark.parametrize("witness", LOOKS.values(), ids=[witness.option for witness in LOOKS.values()])
def test_what_is_looked_at_does_not_change_by_itself(family, observe, witness: Witness):
    """The same options twice; without this any random number would do as a witness."""
    base, _ = witness.sides(observe.lab)
    seen = [_seen(result, witness) for result in (observe(witness.look, base), observe.anew(witness.look, base))]
    assert seen[0] == seen[1]


DEPENDENT = [(needed, name) for needed, names in NEEDS.items() for name in names]
TRAIN = {witness.option: witness for witness in WITNESSES["TrainConfig"]}


@pytest.mark.parametrize(("needed", "name"), DEPENDENT, ids=[name for _, name in DEPENDENT])
def test_option_without_what_it_needs_is_refused_before_anything_is_looked_at(family, observe, needed, name):
    """With the value that its witness has; and that one is not refused."""
    base, changed = TRAIN[name].sides(observe.lab)
    if needed == "lora_base_model":
        value = changed[name] or "to_q"
        options = dict(lora_base_model=None, trainable_models=("dit",), **{name: value})
    else:
        options = {name: changed[name], needed: type(TrainConfig().__getattribute__(needed))()}
        assert base.get(needed) or TrainConfig.model_fields[needed].default
    config = TrainConfig(dataset_base_path="nowhere", model_paths=("nowhere",), **{"lora_base_model": "dit", **options})
    with pytest.raises(UserError, match=f"--{name} has no effect without --{needed}; set --{needed} or leave"):
        check_options(config)
    check_options(config.replace(**{name: TrainConfig.model_fields[name].default}))


@pytest.mark.parametrize(("options", "message"), [
    (dict(height=512, width=512, max_pixels=65536), "--max_pixels has no effect beside --height and --width"),
    (dict(cache="off", cache_path="x"), "--cache_path has no effect with --cache off"),
    (dict(remove_prefix_in_ckpt="pipe.dit.", lora_format="kohya"), "--lora_format has no effect beside"),
    (dict(remove_prefix_in_ckpt="dit."), r"no name in the saved files begins so; they begin with pipe\.dit\."),
    (dict(lr_scheduler="constant_with_warmup"), "constant_with_warmup needs --lr_warmup_steps"),
])
def test_options_that_contradict_each_other_are_refused(options, message):
    config = TrainConfig(dataset_base_path="nowhere", model_paths=("nowhere",), lora_base_model="dit", **options)
    with pytest.raises(UserError, match=message):
        check_options(config)


@pytest.mark.parametrize(("options", "message"), [
    (dict(optimizer="LBFGS"), "several times in one step"),
    (dict(optimizer="Rprop", weight_decay=0.1), "--weight_decay has no effect on Rprop"),
    (dict(optimizer_args={"lr": 1.0}), "lr is the option --learning_rate"),
    (dict(optimizer_args={"weight_decay": 0.1}, weight_decay=0.2), "weight_decay is given twice"),
    (dict(optimizer_args={"epss": 0.1}), "takes no argument 'epss'.* Did you mean 'eps'"),
])
def test_option_that_the_optimizer_would_not_heed_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(**options))


def test_input_that_no_unit_reads_is_refused(family):
    pipe = load_pipeline_class(family.family)()
    with pytest.raises(UserError, match=f"--extra_inputs depth: the family {family.name} reads no such input"):
        check_inputs(TrainConfig(extra_inputs="depth"), pipe)
    for name in ("prompt", "input_image"):
        assert pipe.reads(name)


@pytest.mark.parametrize(("options", "message"), [
    (dict(negative_prompt="a toy"), "--negative_prompt has no effect while --cfg_scale is 1"),
    (dict(denoising_strength=0.5), "no effect without --input_image"),
    (dict(input_image="nowhere.png"), "--input_image has no effect while --denoising_strength is 1"),
])
def test_options_of_drawing_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        generate(GenerateConfig(model_paths=("nowhere",), **options))


@pytest.mark.parametrize("name", schemas())
def test_one_letter_typos_are_refused_with_the_right_suggestion(name, tmp_path):
    """On the command line, in YAML and in Python; benchmarks/typos.py counts all of them."""
    options, right, total = schemas()[name], 0, 0
    spellings = typed_names(options)
    for spelling in spellings:
        for typo in set(sampled_typos(spelling, TYPOS_PER_OPTION)) - set(spellings):
            with pytest.raises(UserError, match=f"unknown option --{typo}") as error:
                read_command_line(options, [f"--{typo}", "1"])
            total += 1
            right += f"Did you mean --{spelling}?" in str(error.value)
    assert right >= RIGHT_SUGGESTIONS * total, f"{right} of {total} first suggestions are right"
    file = tmp_path / "run.yaml"
    for field in options.model_fields:
        typo = next(typo for typo in sampled_typos(field, TYPOS_PER_OPTION) if typo not in options.model_fields)
        suggested = closest(typo, options.model_fields)
        file.write_text(f"# a file\n{typo}: 1\n", encoding="utf-8")
        with pytest.raises(UserError, match=f"run.yaml, line 2: unknown key '{typo}'. Did you mean '{suggested}'"):
            read_yaml(file, options)
        with pytest.raises(UserError, match=f"unknown option '{typo}'. Did you mean '{suggested}'"):
            options(**{typo: 1})


def test_typos_are_all_that_is_one_slip_away():
    found = set(typos("ab"))
    assert {"a", "b", "ba", "aab", "abz", "xb", "_ab"} <= found
    assert "ab" not in found
    assert "" not in found


@pytest.mark.parametrize(("word", "meant", "slips"), [
    ("seed", "seed", 0), ("sed", "seed", 1), ("sseed", "seed", 1), ("sead", "seed", 1), ("esed", "seed", 1),
    ("deed", "seeds", 2), ("", "ab", 2), ("lora", "rank", 4),
])
def test_number_of_slips(word, meant, slips):
    assert num_slips(word, meant) == num_slips(meant, word) == slips


def test_nothing_is_suggested_where_nothing_is_close():
    assert closest("banana", ["seed", "height"]) is None


def test_a_run_is_repeated_from_its_saved_configuration_alone(family, pictures, tmp_path, capsys):
    """Weights and metrics byte for byte; and what is printed before a run is what the run saves."""
    words = family.words(pictures, tmp_path / "run", max_steps=3, batch_size=2, optimizer_args={"eps": 1e-6},
                         caption_dropout=0.3, save_steps=2, random_flip=True, lora_rslora=True, ema_decay=0.9)
    with pytest.raises(SystemExit) as left:
        command("train", *words, "--print_config")
    assert left.value.code in (0, None)
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    command("train", *words)
    saved = tmp_path / "run" / "config.yaml"
    assert saved.read_text(encoding="utf-8") == printed
    command("train", "--config", saved, "--output_path", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if path.suffix in (".safetensors", ".jsonl"))
    assert len(names) >= 4
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    origins = (tmp_path / "again" / "config.yaml").read_text(encoding="utf-8")
    assert "# from: command line\noutput_path: " in origins
    assert "# from: config.yaml\n" in origins


@pytest.mark.parametrize("words", [["train", "--lora_rank", "3"], ["generate", "--prompt", "two\nlines: 小狗"]])
def test_printed_configuration_reads_back_and_loads_nothing(words, tmp_path):
    code = ("import sys\nfrom diffsynth.cli import main\ntry:\n    main()\nfinally:\n"
            "    assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)\n")
    file = tmp_path / "printed.yaml"
    for given in (words, [words[0], "--config", str(file)]):
        finished = subprocess.run([sys.executable, "-c", code, *given, "--print_config"], env=process_environment(),
                                  capture_output=True, text=True, encoding="utf-8", check=False)
        assert (finished.returncode, finished.stderr) == (0, "")
        if given is words:
            assert "# from: command line" in finished.stdout
            file.write_text(finished.stdout, encoding="utf-8")
    again = finished.stdout.partition("# from: printed.yaml\n")[2]
    plain = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert sorted(plain) == sorted(line for line in again.splitlines() if line)


def test_the_schema_of_a_new_option_is_seen(monkeypatch):
    """The check above finds an option that somebody adds."""
    from pydantic.fields import FieldInfo

    from diffsynth.config import InspectConfig

    fields = {**InspectConfig.model_fields, "new_option": FieldInfo(annotation=int, default=1)}
    monkeypatch.setattr(InspectConfig, "__pydantic_fields__", fields)
    with pytest.raises(AssertionError, match="without a witness: new_option"):
        test_every_option_has_one_witness("InspectConfig")


