#!/usr/bin/env bash
# Runs the fast tests with the V100's versions (setup.sh --v100) in a clone that has an environment of its own, and notes
# in .ci/v100_tested which requirements they passed with. Where that is noted already, it only says so.
#
#   bash scripts/test_v100_stack.sh           after a change of the requirements was committed; then commit the note too
#   bash scripts/test_v100_stack.sh --check   says whether the note is right: exit status 1 where it is not
#
# Takes 6 GB in TMPDIR for as long as it runs, and as long as run_tests.sh with a new environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
note=.ci/v100_tested
files=(requirements.txt requirements/constraints-v100.txt requirements/dev.txt)
while read -r _ file; do files+=("requirements/$file"); done < <(grep '^-r [a-z]' requirements/dev.txt) # that it includes

case "${1:-}" in
    "" | --check) ;;
    *)
        sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 2
        ;;
esac

# Of what is installed, not of the comments on it.
now=$(for file in "${files[@]}"; do sed -e 's/ *#.*//' -e '/^ *$/d' "$file"; done | sha256sum | cut -d ' ' -f 1)
if grep -qx "$now" "$note" 2>/dev/null; then
    echo "the fast tests have passed with the V100's versions of these requirements ($note)"
    exit 0
fi
if [[ ${1:-} == --check ]]; then
    echo "the requirements have changed since the fast tests passed with the V100's versions: bash scripts/test_v100_stack.sh" >&2
    exit 1
fi
if [[ -n $(git status --porcelain -- "${files[@]}") ]]; then
    echo "error: commit the changes of ${files[*]} first: a clone is tested" >&2
    exit 2
fi

echo "the requirements have changed: running the fast tests with the V100's versions"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet "$root" "$folder/project"
cd "$folder/project"
bash setup.sh --v100 --dev
# Style, documentation and sizes, which tests/project looks at, do not depend on versions.
bash run_tests.sh --ignore tests/project
cd "$root"
printf '# SHA-256 of the requirements with whose V100 versions the fast tests passed; scripts/test_v100_stack.sh writes it.\n%s\n' \
    "$now" >"$note"
echo "passed: $note says so; commit it"
