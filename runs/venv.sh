#!/usr/bin/env bash
# Make .venv, or check the one that is there; the other scripts source this. PYTHON=python3.12 names another Python.
refuse() { echo "$*" >&2 && exit 1; }
version_of() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null || true; }
is_new() { [[ $1 =~ ^3\.([0-9]+)$ ]] && ((BASH_REMATCH[1] >= 11)); }

python=${PYTHON:-python3}
here=$(version_of "$python")
if [ -e .venv ] || [ -L .venv ]; then
  there=$(version_of .venv/bin/python)
  is_new "$there" ||
    refuse ".venv has ${there:+Python }${there:-no working Python}, and 3.11 or newer is needed: remove .venv, then run this again"
  if [ -n "$here" ] && [ "$here" != "$there" ]; then
    [ -z "${PYTHON:-}" ] || refuse ".venv has Python $there, not the $here of PYTHON=$PYTHON: remove .venv, or leave PYTHON out"
    echo "using .venv, which has Python $there ($python is $here)" >&2
  fi
else
  is_new "$here" ||
    refuse "$python is ${here:+Python }${here:-not there}, and 3.11 or newer is needed: install one, then PYTHON=python3.12 $0"
  "$python" -m venv .venv || { rm -rf .venv && exit 1; }  # half of one would be taken for a whole one
fi
