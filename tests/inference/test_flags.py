"""The flags of an ensemble, and what they become."""

import inspect

import pytest

import app
import evaluate
import predict
from featdistill.cluster import flags as cluster_flags
from featdistill.command_line import Parser
from featdistill.inference.flags import FLAGS, add_flags, load_settings
from featdistill.inference.predictor import load_ensemble
from featdistill.service import flags as service_flags

GIVEN = {
    "released": "d",
    "fusion": "logit_mean",
    "weights": "a=2",
    "tta": "hflip",
    "resize": "crop",
    "batch_size": "4",
    "workers": 0,
    "precision": "bf16",
    "decode": "gpu",
    "device": "cpu",
}


def parser_of(add_arguments):
    parser = Parser()
    add_arguments(parser)
    return parser


def test_flags_are_the_arguments_of_load_ensemble_with_their_defaults():
    parser = Parser()
    add_flags(parser, *FLAGS)
    defaults = vars(parser.parse_args([]))
    expected = {name: one.default for name, one in inspect.signature(load_ensemble).parameters.items()}
    assert {name: defaults[name] for name in expected} == expected | {"experts": []}

    command = [word for name, value in GIVEN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    found = load_settings(parser.parse_args(["--experts", "a", "b", "--compile", *command]))
    assert found == GIVEN | {"compiled": True}
    assert {*found, "experts"} == {*expected}


@pytest.mark.parametrize(
    ("parser", "arguments", "expected"),
    [
        (predict.build_parser(), [], {"batch_size": "auto", "compiled": False, "decode": "cpu"}),
        (evaluate.sweep_parser(), ["m.csv", "--out", "o"], {"batch_size": "auto"}),
        (app.build_parser(), [], {}),
        (parser_of(service_flags.add_arguments), ["--experts", "e"], {"batch_size": "auto"}),
        (cluster_flags.build_parser(), ["--manifest", "m", "--out", "o", "--experts", "e"],
         {"batch_size": "auto"}),
    ],
)  # fmt: skip
def test_commands_leave_what_is_not_given_to_load_ensemble(parser, arguments, expected):
    always = {"fusion": "probability_mean", "tta": "none"}
    assert load_settings(parser.parse_args(arguments)) == always | expected
