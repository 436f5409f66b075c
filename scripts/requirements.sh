#!/usr/bin/env bash
# Updates requirements/lock.txt (lock), or looks up known vulnerabilities of the packages in it (audit).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    lock)
        uv=.venv/bin/uv
        if [[ ! -x $uv ]]; then uv=uv; fi
        # One file for all supported versions of Python; it names no index, so that each user's own is asked.
        "$uv" pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --upgrade --quiet \
            --no-header --no-emit-index-url --no-emit-find-links --output-file requirements/lock.txt >/dev/null
        printf 'requirements/lock.txt: %s packages\n' "$(grep -c '^[A-Za-z0-9].*==' requirements/lock.txt)"
        ;;
    audit)
        if ! .venv/bin/python -m pip_audit --version >/dev/null 2>&1; then
            printf 'error: pip-audit is not installed: .venv/bin/python -m pip install pip-audit\n' >&2
            exit 2
        fi
        # Strict: a package that could not be looked up is a failure, not a pass.
        exec .venv/bin/python -m pip_audit --requirement requirements/lock.txt --require-hashes --disable-pip --strict
        ;;
    *)
        printf 'Usage: bash scripts/requirements.sh lock | audit\n' >&2
        exit 2
        ;;
esac
