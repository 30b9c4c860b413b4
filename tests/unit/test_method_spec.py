"""Methods as stages: names, what each needs, what does not fit together, and settings given as text."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest

from qrealign.calibrate.methods import _TABLE, RANGES, SCHEDULES, CalibrationSettings, method_settings
from qrealign.demo import DEMO_SETTINGS
from qrealign.errors import ConfigError
from qrealign.pipeline.methods import METHODS, NAMES, method_spec
from qrealign.repair.settings import REPAIRS, Interpolation, OneShot


def needs(spec):
    """Return which of the models the method names as missing."""
    given = {"aligned": False, "base": False}
    missing = []
    while (sentence := spec.missing(**given, probe=False)) is not None:
        name = "base" if "--base" in sentence else "aligned"
        assert not given[name]
        given[name] = True
        missing.append(name)
    return sorted(missing)


def test_every_method_by_name_and_what_it_needs():
    expected = {
        "realign": ["aligned"],
        "paper": ["aligned"],
        "reconstruction": [],
        "aaq": ["aligned", "base"],
        "qresafe": ["aligned"],
        "rtn": [],
        "interpolate": ["aligned"],
        "one-shot": [],
        "safelora": ["aligned", "base"],
        "safe-delta": ["aligned"],
    }
    assert {name: needs(method_spec(name)) for name in METHODS} == expected
    assert needs(method_spec("one-shot", setting=["repair.answer=aligned"])) == ["aligned"]
    assert needs(method_spec("rtn", polish=5)) == ["aligned"]


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_alone_is_rounded_to_nearest(name):
    spec = method_spec(name)
    assert spec.repair.name == name and spec.settings.engine == "none" and not spec.rounds_only
    assert spec.describe() == f"repair {name} -> round to nearest"
    assert spec.repair.source and spec.endtoend is None
    assert method_spec("rtn", repair=name).repair == spec.repair


def test_stages_combine():
    spec = method_spec("realign", repair="interpolate", interpolation=0.5, engine="blockwise", polish=7, samples=40)
    assert spec.repair == Interpolation(coefficient=0.5)
    assert (spec.settings.engine, spec.polish.engine, spec.polish.steps) == ("blockwise", "endtoend", 7)
    assert spec.endtoend is spec.polish is spec.data_settings and spec.learns_behind_blocks
    assert spec.describe() == "repair interpolate -> realign, engine blockwise -> polish of 7 steps"
    fewer = spec.with_samples(12)
    assert (fewer.settings.samples, fewer.polish.samples) == (12, 12)
    assert set(spec.identity()) == {"repair", "settings", "polish"}
    assert method_spec("rtn").rounds_only and not method_spec("rtn", polish=3).rounds_only


def test_what_goes_into_the_engine_of_the_whole_model():
    assert method_spec("realign").learns_whole and method_spec("aaq").learns_whole
    assert not any(
        method_spec(name, **more).learns_whole for name, more in (("rtn", {}), ("paper", {}), ("rtn", {"polish": 3}))
    )


def test_settings_are_given_as_text():
    spec = method_spec(
        "one-shot", polish=3, setting=["repair.steps=4", "repair.learning_rate=1e-4", "polish.edit_rank=3", "samples=9"]
    )
    assert spec.repair == OneShot(steps=4, learning_rate=1e-4)
    assert spec.polish.edit_rank == 3 and spec.settings.samples == 9
    assert method_spec("interpolate", setting=["repair.coefficient=1"]).repair.coefficient == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"method": "rtn", "repair": "magic"}, "unknown repair"),
        ({"method": "safelora", "repair": "interpolate"}, "one too many"),
        ({"method": "rtn", "interpolation": 0.5}, "belongs to the repair"),
        ({"method": "realign", "polish": 5}, "end-to-end already"),
        ({"method": "paper", "polish": 5}, "learns its grid"),
        ({"method": "rtn", "setting": ["steps"]}, "not of the form field=value"),
        ({"method": "rtn", "setting": ["probe.steps=1"]}, "not of the form field=value"),
        ({"method": "rtn", "setting": ["magic=1"]}, "magic is unknown"),
        ({"method": "rtn", "setting": ["engine=blockwise"]}, "engine is unknown"),
        ({"method": "rtn", "setting": ["steps=many"]}, "cannot be 'many'"),
        ({"method": "rtn", "setting": ["benign_weight=-1"]}, "--setting benign_weight must be at least 0"),
        ({"method": "rtn", "setting": ["benign_weight=nan"]}, "--setting benign_weight must be at least 0"),
        ({"method": "realign", "setting": ["recovery_least=8"]}, "recovery_least must be at most recovery_tokens"),
        ({"method": "rtn", "polish": 3, "setting": ["polish.edit_rank=0"]}, "polish.edit_rank must be at least 1"),
        ({"method": "interpolate", "setting": ["repair.coefficient=7"]}, "repair.coefficient must be at least 0 and"),
        ({"method": "safe-delta", "setting": ["repair.damping=0"]}, "repair.damping must be above 0"),
        ({"method": "rtn", "setting": ["repair.steps=1"]}, "no such stage"),
        ({"method": "rtn", "setting": ["polish.steps=1"]}, "no such stage"),
        ({"method": "one-shot", "setting": ["repair.refusals=0"]}, "repair.refusals must be at least 1"),
        ({"method": "safe-delta", "setting": ["repair.samples=0"]}, "repair.samples must be at least 1"),
        ({"method": "safe-delta", "setting": ["repair.skipped=1"]}, "below 1"),
        ({"method": "one-shot", "setting": ["repair.answer=none"]}, "fixed or aligned"),
    ],
)
def test_what_does_not_fit_is_told(arguments, message):
    with pytest.raises(ConfigError, match=message):
        method_spec(**arguments)


def test_the_fast_schedule_takes_fewer_larger_steps():
    own, fast = (method_spec("paper", schedule=name).settings for name in ("parity", "fast"))
    assert own == method_spec("paper").settings and own.batch_size == 1 and own.plateau == 0
    assert fast.batch_size == 16 and fast.epochs == own.epochs and fast.plateau > 0
    growth = fast.clip_learning_rate / own.clip_learning_rate
    assert growth == pytest.approx(fast.transform_learning_rate / own.transform_learning_rate) and growth > 1
    given = method_spec("paper", schedule="fast", batch_size=8, setting=["plateau=0"]).settings
    assert given.batch_size == 8 and given.plateau == 0
    assert method_spec("realign", engine="blockwise", schedule="fast").settings.edit_learning_rate == 3e-3
    with pytest.raises(ConfigError, match="shortens the block-wise engine"):
        method_spec("realign", schedule="fast")
    with pytest.raises(ConfigError, match="unknown schedule 'slow': use parity, fast, long"):
        method_spec("paper", schedule="slow")


def test_the_long_schedule_takes_as_many_steps_as_the_data_has_prompts_for():
    spec = method_spec("realign", schedule="long")
    own, long = method_spec("realign").settings, spec.settings
    assert long.samples == 10 * own.samples and long.steps * long.batch_size > 10 * own.steps * own.batch_size
    assert spec.with_samples(long.samples).settings == long
    tenth = spec.with_samples(long.samples // 10).settings
    assert tenth.steps == long.steps // 10 and tenth.samples == long.samples // 10
    assert method_spec("realign").with_samples(200).settings.steps == own.steps
    asked = method_spec("realign", schedule="long", steps=3000).with_samples(200).settings
    assert asked.steps == 3000
    four_bit = method_spec("realign", schedule="long", weight_bits=4, activation_bits=4).settings
    assert four_bit.transform_learning_rate > 0 and four_bit.edit_rank == 64
    for name, engine in (("qresafe", None), ("realign", "blockwise")):
        with pytest.raises(ConfigError, match="--schedule long is for method 'realign'"):
            method_spec(name, engine=engine, schedule="long")


@pytest.mark.parametrize("name", RANGES)
def test_no_setting_of_a_method_is_infinite_or_negative(name):
    for value in ("inf", "-1"):
        with pytest.raises(ConfigError, match=f"--setting {name} (must|cannot) be"):
            method_spec("realign", setting=[f"{name}={value}"])


def test_every_setting_has_a_range_and_every_shipped_value_lies_in_it():
    """Settings check themselves as they are made, so that making them is the test."""
    assert set(RANGES) == {field.name for field in fields(CalibrationSettings)} - set(NAMES)
    for kind in REPAIRS.values():
        assert set(kind.ranges) == {field.name for field in fields(kind)} - {"answer"}
    assert method_spec("realign", setting=DEMO_SETTINGS) and all(method_spec(name) for name in METHODS)
    made = 0
    for bits, schedule, (method, engine, edit) in product((8, 4), SCHEDULES, _TABLE):
        try:
            method_settings(method, engine=engine, edit=edit, schedule=schedule, weight_bits=bits, activation_bits=bits)
            made += 1
        except ConfigError as error:
            assert f"--schedule {schedule}" in str(error)  # not every method has every schedule
    assert made == 2 * (len(_TABLE) + 4 + 3)
