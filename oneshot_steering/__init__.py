"""Steering vectors for language models, optimised from a single example.

    import oneshot_steering as oss

    lm = oss.load_lm()
    fit = oss.optimize(lm, oss.Example(prompt, promote=[...], suppress=[...]), layer=12)
    with lm.steer(fit.steering):
        print(lm.generate(prompt))

These are the names that most programs need. Each is loaded when it is first used, so this import takes no time.
`from oneshot_steering.all import *` gives a notebook more of them, and everything is in the modules."""

# ruff: noqa: F401
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_FRONT_DOOR = {
    "load_lm": "models",
    "LM": "lm",
    "Steering": "steering",
    "load_steering": "steering",
    "Example": "objective",
    "optimize": "optimize",
    "optimize_many": "optimize",
    "Job": "optimize",
    "Stop": "optimize",
    "Retain": "optimize",
    "Fit": "optimize",
    "compare": "evaluate",
    "rates": "evaluate",
    "side_effects": "evaluate",
    "calibrate": "calibrate",
    "Budget": "calibrate",
    "mean_score": "calibrate",
    "caa": "baselines",
    "refusal_direction": "baselines",
    "random_like": "baselines",
    "prefill": "baselines",
    "surprisal": "surprisal",
    "cosines": "geometry",
    "load_organism": "organisms",
    "steering_slider": "slider",
    "steering_figure": "figure",
}
__all__ = list(_FRONT_DOOR)

if TYPE_CHECKING:  # what editors and type checkers read
    from .baselines import caa, prefill, random_like, refusal_direction
    from .calibrate import Budget, calibrate, mean_score
    from .evaluate import compare, rates, side_effects
    from .figure import steering_figure
    from .geometry import cosines
    from .lm import LM
    from .models import load_lm
    from .objective import Example
    from .optimize import Fit, Job, Retain, Stop, optimize, optimize_many
    from .organisms import load_organism
    from .slider import steering_slider
    from .steering import Steering, load_steering
    from .surprisal import surprisal


def __getattr__(name):
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_FRONT_DOOR[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "`oneshot_steering.optimize` is the function, also after the module of the same name was imported."

    def __setattr__(self, name, value):
        if not (name in _FRONT_DOOR and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
