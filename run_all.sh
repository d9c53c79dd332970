#!/usr/bin/env bash
# The whole way, one line a stage: archives -> manifests -> stage 1 -> stage 2 -> predictions -> scores -> zip.
#
#   bash run_all.sh                                    the demo: synthetic data made on the spot, no download, CPU
#   PROFILE=paper DATA=archives bash run_all.sh        the paper's way on the official archives in DATA
#
# A second run goes on where the first was stopped. Further settings, by environment: MANIFESTS and RUNS (where
# manifests and results go), EXPERTS (recipes to train), GPUS (processes to launch), PYTHON.
set -euo pipefail
# Threads that wait must not keep a core busy that loader workers or other programs need.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$(dirname "${BASH_SOURCE[0]}")"

PROFILE=${PROFILE:-demo}
RUNS=${RUNS:-runs/$PROFILE}
PYTHON=${PYTHON:-python}
GPUS=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}

case $PROFILE in
  demo)
    DATA=${DATA:-data/demo/archives} MANIFESTS=${MANIFESTS:-data/demo} HOLDOUT=0.1
    EXPERTS=${EXPERTS:-demo_clip_a demo_clip_b demo_siglip_a demo_siglip_b} ;;
  paper)
    : "${DATA:?PROFILE=paper needs DATA=FOLDER with the official archives (shard_0.zip, val_images.zip, ...)}"
    MANIFESTS=${MANIFESTS:-data/paper} HOLDOUT=0.05
    EXPERTS=${EXPERTS:-clip_l14_a clip_l14_b siglip_so400m_a siglip_so400m_b} ;;
  *)
    echo "run_all.sh: error: unknown PROFILE '$PROFILE'; known: demo, paper" >&2
    exit 2 ;;
esac

launch() { # one process, or one a GPU
  if [ "$GPUS" -gt 1 ]; then
    "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$GPUS" \
      --mixed_precision no --dynamo_backend no "$@"
  else
    "$PYTHON" "$@"
  fi
}

# Data
[ "$PROFILE" = paper ] || "$PYTHON" -m data_prep.demo --out "$DATA"
more=() # the demo's own table of generators; the challenge publishes none
[ ! -f "$DATA/generators.csv" ] || more=(--extra "$DATA/generators.csv")
"$PYTHON" -m data_prep.ntire --root "$DATA" --out "$MANIFESTS" --holdout "$HOLDOUT" "${more[@]}"
data=(--train "$MANIFESTS/train.csv" --val "$MANIFESTS/holdout.csv")

# Experts
teachers=() experts=()
for expert in $EXPERTS; do
  launch train.py --recipe "$expert" "${data[@]}" --out "$RUNS/stage1/$expert"
  launch distill.py --recipe "$expert" --teacher "$RUNS/stage1/$expert/expert" "${data[@]}" --out "$RUNS/stage2/$expert"
  teachers+=("$RUNS/stage1/$expert/expert") experts+=("$RUNS/stage2/$expert/expert")
done

# Predictions: the experts of stage 2. Status 1 says that some images could not be read; the rest is there.
manifests=() predictions=() labels=()
for split in val val_hard public_test private_test; do
  [ -f "$MANIFESTS/$split.csv" ] || continue
  manifests+=("$MANIFESTS/$split.csv") predictions+=("$RUNS/predictions/$split.csv")
  # The organisers keep the labels of the private test; the demo's organisers are at hand.
  answers="$DATA/organisers/${split}_labels.csv"
  if [ -f "$answers" ]; then labels+=("$answers"); else labels+=("$MANIFESTS/$split.csv"); fi
done
"$PYTHON" predict.py --manifest "${manifests[@]}" --experts "${experts[@]}" --out "$RUNS/predictions" || [ $? -eq 1 ]

# The zips of the validation and of the test phase; one that is refused does not keep the scores from being shown.
failed=0
if [ -f "$MANIFESTS/val.csv" ] && [ -f "$MANIFESTS/val_hard.csv" ]; then
  "$PYTHON" make_submission.py --profile val --val "$RUNS/predictions/val.csv" \
    --val-hard "$RUNS/predictions/val_hard.csv" --out "$RUNS/submission_val.zip" || failed=$?
fi
for split in public_test private_test; do
  [ -f "$MANIFESTS/$split.csv" ] || continue
  "$PYTHON" make_submission.py --profile test --test "$RUNS/predictions/$split.csv" \
    --out "$RUNS/submission_$split.zip" || failed=$?
done

# Scores of the splits whose labels are known
"$PYTHON" evaluate.py --predictions "${predictions[@]}" --labels "${labels[@]}" --out "$RUNS/scores" || failed=$?
exit "$failed"
