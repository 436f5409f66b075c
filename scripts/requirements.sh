#!/usr/bin/env bash
# Updates requirements/lock.txt and lock-all.txt (lock), or looks up known vulnerabilities of all in them (audit).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(requirements/serve.txt requirements/shards.txt requirements/dicom.txt requirements/weights.txt
    requirements/parquet.txt)
case ${1:-} in
    lock)
        uv=.venv/bin/uv
        if [[ ! -x $uv ]]; then uv=uv; fi
        # One file for all supported versions of Python; it names no index, so that each user's own is asked.
        how=(--universal --python-version 3.11 --generate-hashes --quiet --no-header --no-emit-index-url
            --no-emit-find-links)
        "$uv" pip compile requirements.txt --upgrade "${how[@]}" --output-file requirements/lock.txt >/dev/null
        # The same versions, and what the extras add.
        "$uv" pip compile requirements.txt "${extras[@]}" --constraint requirements/lock.txt --upgrade "${how[@]}" \
            --output-file requirements/lock-all.txt >/dev/null
        for file in lock lock-all; do
            printf 'requirements/%s.txt: %s packages\n' $file "$(grep -c '^[A-Za-z0-9].*==' requirements/$file.txt)"
        done
        ;;
    audit)
        if ! .venv/bin/python -m pip_audit --version >/dev/null 2>&1; then
            printf 'error: pip-audit is not installed: .venv/bin/python -m pip install pip-audit\n' >&2
            exit 2
        fi
        # Strict: a package that could not be looked up is a failure, not a pass.
        exec .venv/bin/python -m pip_audit --requirement requirements/lock-all.txt --require-hashes --disable-pip --strict
        ;;
    *)
        printf 'Usage: bash scripts/requirements.sh lock | audit\n' >&2
        exit 2
        ;;
esac
