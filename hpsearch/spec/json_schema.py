"""The JSON schema of a study file, for editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from hpsearch.registry import TASKS
from hpsearch.spec.study import study_class


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, for editors. It knows the short forms that the validators accept."""
    schema = study_class(*TASKS.built_in).model_json_schema(schema_generator=GenerateJsonSchema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties, definitions = schema["properties"], schema["$defs"]
    paths = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    aligned = {"$ref": "#/$defs/AlignedFiles"}
    for split in definitions["FileSplits"]["properties"].values():
        split["anyOf"] = [*paths["anyOf"], aligned]
    for section in ("DataSpec", "MixedSourceSpec"):
        _also(definitions[section]["properties"]["files"], {"anyOf": [*paths["anyOf"], aligned]})
    _also(properties["data"], {"type": "array", "items": {"$ref": "#/$defs/MixedSourceSpec"}, "minItems": 1})
    _also(properties["sampler"], definitions["SamplerSpec"]["properties"]["name"])
    _also(definitions["PruneSpec"]["properties"]["overfit"], {"type": "boolean"})
    _also(definitions["PruneSpec"]["properties"]["unpromising"], definitions["UnpromisingSpec"]["properties"]["rule"])
    properties["store"]["type"] = "string"
    # A task that is not built in has its options under its own name.
    schema["if"] = {"properties": {"task": {"enum": list(TASKS.built_in)}}, "required": ["task"]}
    schema["then"] = {"propertyNames": {"enum": list(properties)}}
    del schema["additionalProperties"]
    return schema


def _also(schema: dict[str, Any], short_form: dict[str, Any]) -> None:
    choices = schema.pop("anyOf", None) or [{"$ref": schema.pop("$ref")}]
    schema["anyOf"] = [*choices, {key: value for key, value in short_form.items() if key != "default"}]
