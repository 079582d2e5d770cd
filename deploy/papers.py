"""What goes with a release for machines: the bill of materials, the provenance, the sums."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.artifact import MANIFEST, Provenance, tool_versions
from ..core.kinds import UNKNOWN_LICENCE, Checkpoint, Release
from ..core.sealed import KEY, list_files, sha256_file
from ..data.dataset import Dataset
from .card import markdown
from .changes import changed
from .licences import begins_elsewhere, called
from .told import Numbers, Told, accuracies

BUILD_TYPE = "urn:kdpipe:release:v1"
BUILDER = "urn:kdpipe:host"  # a machine of the releaser's own: nobody else vouches for what it did
MOST_CHANGES = 40  # of a bundle, in words
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"


# ---- bill of materials -------------------------------------------------------------------------------------


def bill(told: Told, folder: Path, key: str, made: datetime) -> str:
    """bom.cdx.json: the bundles with their hashes, the networks and data behind them, and the tools, in CycloneDX 1.6.

    The library has no field for a model card yet: that of the schema is put into what it writes.

    Args:
        folder: where the bundles of the release lie.
        key: of the release, of which its serial number is made.
    """
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def component(name: str, kind: ComponentType, licence: str | None, **more: Any) -> Component:
        return Component(name=name, type=kind, bom_ref=more.pop("ref"), licenses=_licences(licence), **more)

    facts = told.facts
    root = component(
        facts.name,
        ComponentType.MACHINE_LEARNING_MODEL,
        told.license,
        ref=f"release:{key[:12]}",
        version=facts.version,
        description=f"{told.task.name}, {len(told.bundles)} bundles",
    )
    bundles = {
        name: component(
            name,
            ComponentType.MACHINE_LEARNING_MODEL,
            None,
            ref=f"bundle:{name}",
            version=facts.version,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256_file(folder / name / bundle.facts.entry))],
            properties=[
                Property(name=f"kdpipe:{field}", value=str(value))
                for field, value in (
                    ("target", bundle.facts.target),
                    ("variant", bundle.facts.variant),
                    ("precision", bundle.facts.precision),
                    ("file", f"{Release.BUNDLES}/{name}/{bundle.facts.entry}"),
                    ("key", bundle.key),
                )
            ],
        )
        for name, bundle in told.bundles.items()
    }
    networks = {
        source.key: component(
            (its := Checkpoint.facts_of(source)).model,
            ComponentType.MACHINE_LEARNING_MODEL,
            facts.licences.get(f"weights of {its.model}"),
            ref=f"network:{source.key[:12]}",
            version=source.key[:12],
            description=f"{its.method}, {its.parameters} parameters",
        )
        for source in told.networks.values()
    }
    data = {
        data_key: component(
            called(its.source),
            ComponentType.DATA,
            facts.licences.get(f"data {called(its.source)}"),
            ref=f"data:{data_key[:12]}",
            version=data_key[:12],
            description=f"{its.classes} classes, {sum(its.images.values())} images",
        )
        for data_key, its in told.data.items()
    }
    tools = [
        component(
            name,
            ComponentType.LIBRARY,
            None,
            ref=f"tool:{name}",
            version=version,
            purl=PackageURL("pypi", name=name.lower(), version=version),
        )
        for name, version in tool_versions().items()
    ]
    made_of = [*bundles.values(), *networks.values(), *data.values()]
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"kdpipe:{key}"),
        metadata=BomMetaData(component=root, timestamp=made),
        components=[*made_of, *tools],
    )
    bom.register_dependency(root, bundles.values())
    for name, bundle in told.bundles.items():
        lineage = bundle.manifest.lineage_keys
        behind = [*networks.items(), *data.items()]
        bom.register_dependency(bundles[name], [each for key_, each in behind if key_ in lineage])
    for each in (*networks.values(), *data.values(), *tools):
        bom.register_dependency(each)
    value = json.loads(JsonV1Dot6(bom).output_as_string())
    references = [each.bom_ref.value for each in data.values()]
    value["metadata"]["component"]["modelCard"] = model_card(told, told.numbers(), references)
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def model_card(told: Told, numbers: Numbers | None, data: Iterable[str | None]) -> dict[str, Any]:
    """The card as the schema of CycloneDX has it; ``data`` are the references of the data sets."""
    metrics = [
        {
            "type": told.task.metric,
            "value": f"{row.accuracy.value:.6g}",
            "slice": row.bundle,
            **(
                {
                    "confidenceInterval": {
                        "lowerBound": f"{row.accuracy.low:.6g}",
                        "upperBound": f"{row.accuracy.high:.6g}",
                    }
                }
                if row.accuracy.low is not None and row.accuracy.high is not None
                else {}
            ),
        }
        for row in (accuracies(numbers) if numbers is not None else ())
        if row.accuracy is not None
    ]
    students = [facts.model for _, facts in told.students]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": told.task.name,
            **({"modelArchitecture": ", ".join(dict.fromkeys(students))} if students else {}),
            "datasets": [{"ref": each} for each in data],
            "inputs": [{"format": "RGB image, 0..255"}],
            "outputs": [{"format": f"{len(next(iter(told.bundles.values())).labels)} classes"}],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }


def _licences(licence: str | None) -> list[Any]:
    """As the library has them; none where nobody said."""
    if licence is None or licence == UNKNOWN_LICENCE:
        return []
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
    from cyclonedx.spdx import fixup_id, is_expression

    if (known := fixup_id(licence)) is not None:
        return [DisjunctiveLicense(id=known)]
    return [LicenseExpression(licence) if is_expression(licence) else DisjunctiveLicense(name=licence)]


# ---- provenance --------------------------------------------------------------------------------------------


def provenance(told: Told, folder: Path, key: str, made: datetime) -> dict[str, Any]:
    """provenance.json: an in-toto statement with SLSA's predicate, of every file of every bundle.

    It says how the bundles came about by their own lineage, and is worth what its signature is worth.
    """
    facts = told.facts
    subjects = [
        {"name": f"{Release.BUNDLES}/{name}", "digest": {"sha256": sha256_file(folder / name)}}
        for name, _ in sorted(list_files(folder))
    ]
    ancestors: dict[str, Provenance] = {}
    for bundle in told.bundles.values():
        _gather(bundle.manifest.provenance(), ancestors)
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "name": facts.name,
                    "version": facts.version,
                    "bundles": {name: bundle.key for name, bundle in told.bundles.items()},
                    "report": None if told.report is None else told.report.key,
                    "last": None if told.last is None else told.last.facts.title,
                },
                "internalParameters": {"tools": tool_versions()},
                "resolvedDependencies": [_dependency(each) for each in ancestors.values()],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"kdpipe": __version__}},
                "metadata": {"invocationId": f"urn:kdpipe:{key}", "finishedOn": made.isoformat()},
            },
        },
    }


def _gather(source: Provenance, found: dict[str, Provenance]) -> None:
    if source.key not in found:
        found[source.key] = source
        for each in source.inputs.values():
            _gather(each, found)


def _dependency(source: Provenance) -> dict[str, Any]:
    """One artifact of the lineage; with the hash of the contents where its configuration knows one."""
    known = source.config.get("checkpoint_sha256") if source.kind == Checkpoint.kind else None
    known = source.config.get("fingerprint") if source.kind == Dataset.kind else known
    is_hash = isinstance(known, str) and KEY.fullmatch(known) is not None
    name = called(str(source.facts.get("source", ""))) if source.kind == Dataset.kind else source.facts.get("model", "")
    return {
        "name": f"{source.kind} {name}".strip(),
        "uri": f"urn:kdpipe:{source.key}",
        **({"digest": {"sha256": known}} if is_hash else {}),
        "annotations": {
            "stage": source.stage,
            "madeFrom": {role: f"urn:kdpipe:{each.key}" for role, each in source.inputs.items()},
            **({"beginsElsewhere": begins_elsewhere(source)} if source.kind == Checkpoint.kind else {}),
        },
    }


# ---- sums --------------------------------------------------------------------------------------------------


def sums(folder: Path) -> str:
    """SHA256SUMS, as sha256sum -c reads it: of every file, but for itself and what is written after it."""
    later = (Release.SUMS, MANIFEST, Release.SIGNATURE)
    names = sorted(name for name, _ in list_files(folder) if name not in later)
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)


# ---- what changed ------------------------------------------------------------------------------------------


def changes(told: Told) -> str:
    """CHANGELOG.md: what differs from the last release, bundle by bundle."""
    facts, last = told.facts, told.last
    lines = [f"# {markdown(facts.name)} {markdown(facts.version)}", ""]
    if last is None:
        return "\n".join([*lines, "No release before this one was named.", ""])
    lines += [f"Against {markdown(last.facts.title)}:", ""]
    before, now = last.bundles, told.bundles
    for name in [*now, *(name for name in before if name not in now)]:
        shown = markdown(name)
        if name not in before or name not in now:
            lines.append(f"- {shown}: {'new' if name in now else 'no longer there'}")
        elif before[name].key == now[name].key:
            lines.append(f"- {shown}: the same")
        else:
            sizes = [f"{each.facts.size_bytes / 2**20:.2f} MiB" for each in (before[name], now[name])]
            lines.append(f"- {shown}: made anew, {sizes[0]} before, {sizes[1]} now")
            moved = changed(before[name].manifest, now[name].manifest)
            lines += [f"  - {markdown(each.words())}" for each in moved[:MOST_CHANGES]]
            if len(moved) > MOST_CHANGES:
                lines.append(f"  - and {len(moved) - MOST_CHANGES} more")
    was, is_ = last.facts.licences, facts.licences
    for name in dict.fromkeys([*was, *is_]):
        if was.get(name) != is_.get(name):
            old, new = (markdown(each.get(name, "nothing")) for each in (was, is_))
            lines.append(f"- licence of the {markdown(name)}: {old} before, {new} now")
    return "\n".join([*lines, ""])
