#!/usr/bin/env bash
# The whole pipeline, one line per stage: archives -> manifests -> stage 1 -> stage 2 -> predictions -> scores -> zip.
#
#   bash run_all.sh                                    the demo: synthetic data, no downloads, CPU
#   PROFILE=paper DATA=archives bash run_all.sh        the paper's experts on the official archives in DATA
#   METHOD=featdistill_crd bash run_all.sh             the paper's other reading of stage 2, or any recipe on top
#
# Running it again continues where it stopped. Further settings, as environment variables: MANIFESTS and RUNS (folders
# for manifests and results), EXPERTS (recipes to train), METHOD (recipes on top of each), GPUS (processes to launch),
# PYTHON.
set -euo pipefail
# Waiting threads must not occupy cores that loader workers or other programs need.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$(dirname "${BASH_SOURCE[0]}")"
# A stage that is told to stop saves and ends with status 0; the stages after it must not start.
trap 'exit 143' TERM

PROFILE=${PROFILE:-demo}
RUNS=${RUNS:-runs/$PROFILE}
PYTHON=${PYTHON:-python}
METHOD=${METHOD:-}
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

launch() { # one process, or one per GPU
  if [ "$GPUS" -gt 1 ]; then
    "$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$GPUS" \
      --mixed_precision no --dynamo_backend no "$@"
  else
    "$PYTHON" "$@"
  fi
}

# Data
[ "$PROFILE" = paper ] || "$PYTHON" -m data_prep.demo --out "$DATA"
more=() # the demo has a table of generators; the challenge does not publish one
[ ! -f "$DATA/generators.csv" ] || more=(--extra "$DATA/generators.csv")
"$PYTHON" -m data_prep.ntire --root "$DATA" --out "$MANIFESTS" --holdout "$HOLDOUT" "${more[@]}"
data=(--train "$MANIFESTS/train.csv" --val "$MANIFESTS/holdout.csv")

train() { # RUN SCRIPT ARGUMENTS...
  local run=$1 status=0
  shift
  launch "$@" "${data[@]}" --out "$run" || status=$?
  # Status 1: some images could not be read, the rest is done. But a launcher of several processes ends with 1 whatever
  # went wrong, so the last epoch's expert must be there.
  if [ "$status" -eq 1 ] && "$PYTHON" -c 'import json, sys
card = json.load(open(sys.argv[1], encoding="utf-8"))
sys.exit(card["epoch"] != card["recipe"]["epochs"])' "$run/expert-last/expert.json" 2>/dev/null; then
    status=0
  fi
  return "$status"
}

# Experts
experts=()
for expert in $EXPERTS; do
  train "$RUNS/stage1/$expert" train.py --recipe "$expert" $METHOD
  train "$RUNS/stage2/$expert" distill.py --recipe "$expert" $METHOD --teacher "$RUNS/stage1/$expert/expert-last"
  experts+=("$RUNS/stage2/$expert/expert")
done

# Predictions of the stage-2 experts. Status 1: some images could not be read, the rest is done.
manifests=() predictions=() labels=()
for split in val val_hard public_test private_test; do
  [ -f "$MANIFESTS/$split.csv" ] || continue
  manifests+=("$MANIFESTS/$split.csv") predictions+=("$RUNS/predictions/$split.csv")
  # Labels of the private test exist only in the demo.
  answers="$DATA/organisers/${split}_labels.csv"
  if [ -f "$answers" ]; then labels+=("$answers"); else labels+=("$MANIFESTS/$split.csv"); fi
done
launch predict.py --manifest "${manifests[@]}" --experts "${experts[@]}" --out "$RUNS/predictions" || [ $? -eq 1 ]

# Scores of the splits with known labels, and the report
failed=0
"$PYTHON" evaluate.py --predictions "${predictions[@]}" --labels "${labels[@]}" --out "$RUNS/scores" || failed=$?
known=() # for the ledger of submissions
[ ! -f "$RUNS/scores/metrics.json" ] || known=(--scores "$RUNS/scores/metrics.json")

# Zips of the validation and the test phase; if one is refused, the others are still written.
if [ -f "$MANIFESTS/val.csv" ] && [ -f "$MANIFESTS/val_hard.csv" ]; then
  "$PYTHON" make_submission.py --profile val --val "$RUNS/predictions/val.csv" \
    --val-hard "$RUNS/predictions/val_hard.csv" --out "$RUNS/submission_val.zip" "${known[@]}" || failed=$?
fi
for split in public_test private_test; do
  [ -f "$MANIFESTS/$split.csv" ] || continue
  "$PYTHON" make_submission.py --profile test --test "$RUNS/predictions/$split.csv" \
    --out "$RUNS/submission_$split.zip" "${known[@]}" || failed=$?
done
exit "$failed"
