"""`be-serve inspect T.safetensors`: print a token file's manifest and checks."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("inspect")
@click.argument("token_file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(token_file: str, as_json: bool) -> None:
    """Check TOKEN_FILE and print its manifest. A damaged file is an error."""
    import numpy as np

    from be_serve.core.artifact import Token, check_vectors, file_digest, read_limited
    from be_serve.core.errors import InvalidArtifact

    data = read_limited(token_file)
    token = Token.from_bytes(data)
    norms = np.linalg.norm(token.vectors, axis=1)
    fits = {}
    for dtype in ("float16", "bfloat16", "float32"):
        try:
            check_vectors(token.vectors, dtype=dtype)
            fits[dtype] = True
        except InvalidArtifact:
            fits[dtype] = False
    checks: dict[str, Any] = {
        "file_sha256": file_digest(data),
        "bytes": len(data),
        "finite": True,
        "tensor_matches_digest": True,
        "fits_dtype": fits,
        "norm": {"min": float(norms.min()), "mean": float(norms.mean()), "max": float(norms.max())},
        "max_abs": float(np.abs(token.vectors).max()),
    }
    manifest = token.manifest.model_dump(mode="json")
    if as_json:
        click.echo(json.dumps({"manifest": manifest, "checks": checks}, ensure_ascii=False))
        return
    for title, values in (("manifest", manifest), ("checks", checks)):
        click.secho(title, bold=True)
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            click.echo(f"  {name:<22}{text}")
