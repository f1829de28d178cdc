"""Readers of public annotation formats: files in, `Sample`s out (`registry` names them all)."""
