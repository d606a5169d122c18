"""What a file system that failed says, and what to do: a folder's, or a bucket's through fsspec and gcsfs."""


def reason(exc: Exception, *, writing: bool = False) -> str:
    """Why. Roles: https://cloud.google.com/storage/docs/access-control/iam-roles"""
    text = " ".join(str(exc).split())[:300] or type(exc).__name__
    if isinstance(exc, FileNotFoundError):
        return "does not exist: check the path, or the bucket's name"
    do, role = ("write there", "objectUser") if writing else ("read it", "objectViewer")
    if isinstance(exc, PermissionError):
        return f"no right to {do} ({text}): change its owner or mode"
    if text.startswith("Forbidden") or str(getattr(exc, "code", "")) in ("401", "403"):
        # An expired login is a 401 "Invalid Credentials" (gcsfs).
        return (
            f"no right to {do} ({text}): run `gcloud auth application-default login`, or give the "
            f"service account the role roles/storage.{role} on the bucket"
        )
    if writing:
        return f"cannot be written ({text}): start again with the same command"
    return f"cannot be read ({text})"
