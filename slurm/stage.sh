#!/bin/bash
# Copy shards to a disk of this node, each held against the checksum in its index.
#
#   bash slurm/stage.sh TARGET_DIR SHARD...
#
# A shard that is there already and whole is not copied again, so a requeued job starts at once.
# Where there is no index, a copy is compared with its source. STAGE_JOBS (4) shards are copied at
# a time.
set -euo pipefail

stage_one() {
  local source=$1 target index sum
  target=$TARGET_DIR/$(basename "$source")
  index=$(index_of "$source")
  if [[ -f $target ]] && known "$(checksum "$target")" "$source" "$index"; then return; fi
  cp "$source" "$target.part.$$"
  sum=$(checksum "$target.part.$$")
  if ! known "$sum" "$source" "$index"; then
    rm -f "$target.part.$$"
    echo "stage: $source arrives with SHA-256 $sum, which is not that in ${index:-the source}" >&2
    return 1
  fi
  mv "$target.part.$$" "$target"
}

checksum() { sha256sum "$1" | cut -d ' ' -f 1; }

# train-000012.tar, train-000013.tar, ... are described by train.index.json beside them.
index_of() {
  local index
  index=$(sed -E 's/[-_.]*[0-9]*\.tar$//' <<< "$1").index.json
  if [[ -f $index ]]; then echo "$index"; fi
}

known() {
  if [[ -n $3 ]]; then grep -q "\"$1\"" "$3"; else [[ $1 == "$(checksum "$2")" ]]; fi
}

export -f stage_one checksum index_of known

[[ $# -ge 2 ]] || { echo "usage: bash slurm/stage.sh TARGET_DIR SHARD..." >&2; exit 2; }
export TARGET_DIR=$1
shift
for shard in "$@"; do
  [[ -f $shard ]] || { echo "stage: no shard $shard" >&2; exit 1; }
done
mkdir -p "$TARGET_DIR"
rm -f "$TARGET_DIR"/*.part.*

need=0 # KiB, as df counts
while read -r bytes; do need=$((need + bytes / 1024 + 1)); done < <(stat -L -c %s "$@")
have=$(($(df -k --output=avail "$TARGET_DIR" | tail -n 1) + $(du -sk "$TARGET_DIR" | cut -f 1)))
if ((need > have)); then
  echo "stage: the shards take $((need / 1024)) MiB, $TARGET_DIR has room for $((have / 1024)) MiB" >&2
  exit 1
fi

# shellcheck disable=SC2016  # $1 is for the inner shell
printf '%s\0' "$@" | xargs -0 -n 1 -P "${STAGE_JOBS:-4}" bash -euo pipefail -c 'stage_one "$1"' stage
for shard in "$@"; do index_of "$shard"; done | sort -u | while read -r index; do
  cp "$index" "$TARGET_DIR"
done
echo "stage: $# shards are in $TARGET_DIR" >&2
