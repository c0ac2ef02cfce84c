"""Makes the methods of this package known to PEFT. Nothing else touches PEFT's registry."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def _extend_peft_type(name: str) -> None:
    """Adds a member to PEFT's enum of methods, which `register_peft_method` insists on.

    Name and value are equal: PEFT looks methods up by the string in adapter_config.json.
    """
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member


def register(config_cls: Any, model_cls: type) -> None:
    """Registers a method; a second time does nothing.

    Args:
        config_cls: its configuration, whose `method_name` is the upper-case name of the method, such as `"NOLA"`.
        model_cls: its tuner.

    Raises:
        RuntimeError: this release of PEFT has another method of that name.
    """
    name = config_cls.method_name
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)  # type: ignore[call-overload]
    if known is not None and known.__module__ == config_cls.__module__:
        # Imported before, perhaps as another module object (reloading, test runners): the newest classes count.
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)] = model_cls
        return
    if known is not None or name in PeftType.__members__:
        raise RuntimeError(
            f"This release of PEFT has a method {name} of its own, which is not the one of peft_ext. Use PEFT's with "
            "peft_ext uninstalled, or install an older release of peft."
        )
    _extend_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
