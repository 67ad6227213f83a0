#!/bin/sh
# Makes a corpus of the bundled checkpoints: config, no index, weights.
set -e
cd "$(dirname "$0")"
mkdir -p corpus/open
for dir in ../tests/fixtures/parity/*/* ../tests/fixtures/unrun/*; do
    [ -f "$dir/model.safetensors" ] || continue
    out="corpus/open/$(basename "$(dirname "$dir")")-$(basename "$dir")"
    { cat "$dir/config.json"; printf '\000\377\000\000\377\000'; cat "$dir/model.safetensors"; } >"$out"
done
