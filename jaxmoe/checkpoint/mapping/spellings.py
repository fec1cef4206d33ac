"""The names that a family has for one tensor: those of transformers and of publishers, of which an adapter has one."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator

from jaxmoe.models import Family

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


class Spellings:
    """The names of a family by each other, from the tables that its tensors are found with.

    Names are of one tensor where the same parameters have them: a tensor of gate and up is not one of gate alone. Modules of
    routed experts are of one module, whatever their tensors are called, for an adapter may have experts in another form.
    """

    def __init__(self, family: Family):
        self._family = family
        owners: dict[str, set[str]] = defaultdict(set)
        for path, names in family.tensors.items():
            for name in names:
                owners[name].add(path)
        self._modules: list[str] = []
        for experts in filter(None, (family.experts, family.renamed_experts)):
            for field in ("gate_up", "gate", "up", "down"):
                for name in filter(None, (getattr(experts, f"fused_{field}"), getattr(experts, field, None))):
                    module = re.sub(r"(\.\{expert\})?\.\w+(\.weight)?$", "", name)
                    if module not in self._modules:
                        self._modules.append(module)
                    owners[name].add(f"experts {field}")
        together: dict[frozenset[str], list[str]] = defaultdict(list)
        for name, paths in owners.items():
            together[frozenset(paths)].append(name)
        self._same = {name: names for names in together.values() for name in names}

    def find(self, name: str, names: Collection[str]) -> str:
        """Give that of `names` which is the tensor that `name` is, in a multimodal model or its text part.

        `name` is given as it is in the text part where none of them is.
        """
        name = self._family.text_name(name)
        return name if name in names else next((other for other in self._others(name) if other in names), name)

    def _others(self, name: str) -> Iterator[str]:
        found = _LAYER.search(name)
        layer = found[0] if found else ""
        template = _LAYER.sub("{layer}", name, count=1)
        for other in self._same.get(template, ()):
            yield other.replace("{layer}", layer)
        for module in self._modules:
            if template.startswith(f"{module}."):
                rest = template.removeprefix(module)
                for other in self._modules:
                    yield f"{other}{rest}".replace("{layer}", layer)
