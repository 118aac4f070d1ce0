"""Makes ReFT a PEFT method from outside PEFT: the one place that reaches into PEFT's registries.

Importing this adds the member `PeftType.REFT`; `register` then hands PEFT our config and model classes. A saved
adapter therefore loads only after `import reftune`.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.utils import PeftType, register_peft_method
from peft.utils.other import TrainableTokensWrapper

NAME = "reft"
PREFIX = "reft_"  # transformers' delete_adapter derives it so: lower-case method name + "_"


def _add_peft_type() -> PeftType:
    """`PeftType.REFT`, added to the enum if PEFT has no such member."""
    key = NAME.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    try:
        member = str.__new__(PeftType, key)
        member._name_ = key
        member._value_ = key
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
        PeftType._member_names_.append(key)
        type.__setattr__(PeftType, key, member)  # before Python 3.12 a lookup in _member_map_ stood in for it
        if PeftType(key) is not member or getattr(PeftType, key) is not member or key not in list(PeftType):
            raise TypeError(f"PeftType does not take a new member: {list(PeftType)}")
    except Exception as error:
        raise ImportError(
            "reftune adds the method REFT to peft.PeftType, and this version of PEFT does not let it: "
            f"{type(error).__name__}: {error}. reftune supports peft>=0.21,<0.22; install such a version."
        ) from error
    return member


PEFT_TYPE = _add_peft_type()


def register(config_cls: type, model_cls: type) -> None:
    """Hand PEFT the classes of the method; calling it again does nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if PEFT_TYPE_TO_TUNER_MAPPING.get(PEFT_TYPE) is model_cls:
        return
    if PEFT_TYPE in PEFT_TYPE_TO_TUNER_MAPPING:
        other = PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE]
        raise ImportError(
            f"PEFT already has a method named '{NAME}' ({other.__module__}.{other.__qualname__}): "
            "reftune cannot register its own beside it."
        )
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)


def replace_method(cls: type, name: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of one of PEFT's methods in its place; calling it again does nothing."""
    original = getattr(cls, name)
    if not getattr(original, "_reftune", False):
        method: Any = functools.wraps(original)(make(original))
        method._reftune = True
        setattr(cls, name, method)


def accept_several() -> None:
    """Let `PeftModel.set_adapter` take a list, as a tuner's own does; PEFT's takes one name."""
    replace_method(PeftModel, "set_adapter", _of_several)


def _of_several(original: Any) -> Any:
    def set_adapter(self: PeftModel, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        if isinstance(adapter_name, str) or self.peft_type != PEFT_TYPE:
            return original(self, adapter_name, *args, **kwargs)
        for name in adapter_name:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} not found.")
        if not adapter_name:
            raise ValueError("set_adapter got no adapter: use disable_adapter() for the base model.")
        self.base_model.set_adapter(list(adapter_name), *args, **kwargs)
        self.active_adapter = adapter_name[0]
        return None

    return set_adapter


def spare_tokens() -> None:
    """Let adapters without `trainable_token_indices` be saved and loaded beside one that has them: PEFT asks the
    embeddings' wrapper for every adapter's, and fails with a KeyError."""
    for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
        replace_method(TrainableTokensWrapper, name, _of_those_that_have_any)


def _of_those_that_have_any(original: Any) -> Any:
    def method(self: TrainableTokensWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, adapter_name, *args, **kwargs) if adapter_name in self._get_available_adapters() else {}

    return method
