#!/usr/bin/env bash
# The whole pipeline, one line per stage: archives -> manifests -> stage 1 -> stage 2 -> predictions -> scores -> zip.
#
#   bash run_all.sh                                                the demo: synthetic data, no downloads, CPU
#   PROFILE=paper DATA=archives bash run_all.sh                    the paper's experts on the official archives in DATA
#   METHOD=featdistill_crd bash run_all.sh                         the paper's other reading of stage 2, or any recipe on top
#   bash run_all.sh PROFILE=paper DATA=archives EXPERTS=teams/intsig    the experts of a team of the challenge
#
# Running it again continues where it stopped. Further settings, as environment variables or arguments: MANIFESTS and
# RUNS (folders for manifests and results), EXPERTS (recipes to train, or committees of them), METHOD (recipes on top of
# each), PREDICT (flags of predict.py instead of those in the recipes), GPUS (processes to launch), PYTHON.
set -euo pipefail
# Waiting threads must not occupy cores that loader workers or other programs need.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$(dirname "${BASH_SOURCE[0]}")"
# A stage that is told to stop saves and ends with status 0; the stages after it must not start.
trap 'exit 143' TERM

for setting in "$@"; do
  case $setting in
    PROFILE=* | DATA=* | MANIFESTS=* | RUNS=* | EXPERTS=* | METHOD=* | PREDICT=* | GPUS=* | PYTHON=*)
      declare "$setting" ;;
    *)
      echo "run_all.sh: error: '$setting' is not a setting such as EXPERTS=teams/vincentlc; see the head of this file" >&2
      exit 2 ;;
  esac
done
PROFILE=${PROFILE:-demo}
METHOD=${METHOD:-}
# Other experts and methods get a folder of their own: runs/paper-teams-intsig
changes="${EXPERTS:+-$EXPERTS}${METHOD:+-$METHOD}"
RUNS=${RUNS:-runs/$PROFILE${changes//[ \/]/-}}
PYTHON=${PYTHON:-python}
PREDICT=${PREDICT:-}
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

# What the recipes say: experts with the number of their stages, flags of predict.py, measured weights or not
plan=$("$PYTHON" -m featdistill recipes --plan $EXPERTS --on-top $METHOD)
flags=$(sed -n 's/^predict //p' <<< "$plan")

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
  # went wrong, so the expert must be that of a finished run.
  if [ "$status" -eq 1 ] && "$PYTHON" -c 'import json, sys
card = json.load(open(sys.argv[1], encoding="utf-8"))
sys.exit(not card["finished"])' "$run/expert-last/expert.json" 2>/dev/null; then
    status=0
  fi
  return "$status"
}

# Experts
experts=()
mapfile -t lines < <(grep '^expert ' <<< "$plan")
for line in "${lines[@]}"; do
  read -r _ expert stages <<< "$line"
  train "$RUNS/stage1/$expert" train.py --recipe "$expert" $METHOD
  if [ "$stages" = 2 ]; then
    train "$RUNS/stage2/$expert" distill.py --recipe "$expert" $METHOD --teacher "$RUNS/stage1/$expert/expert-last"
  fi
  experts+=("$RUNS/stage$stages/$expert/expert")
done

# Weights of the experts, if they are measured: on a distorted copy of the hold-out
weights=()
if grep -q '^weights_by ' <<< "$plan"; then
  "$PYTHON" -m data_prep.distort_split "$MANIFESTS/holdout.csv" --share 1 \
    --out "$MANIFESTS/holdout_distorted" || [ $? -eq 1 ]
  launch predict.py --manifest "$MANIFESTS/holdout_distorted/manifest.csv" --experts "${experts[@]}" $flags \
    --out "$RUNS/weights/holdout.csv" || [ $? -eq 1 ]
  method=probability_mean
  [[ " $flags " != *" --fusion logit_mean "* ]] || method=logit_mean
  "$PYTHON" -m featdistill fuse --predictions "$RUNS/weights/holdout.csv" --method "$method" \
    --weights-by robust_auc --out "$RUNS/weights/fusion.json"
  weights=(--fusion "$RUNS/weights/fusion.json")
fi

# Predictions of the experts. Status 1: some images could not be read, the rest is done.
manifests=() predictions=() labels=()
for split in val val_hard public_test private_test; do
  [ -f "$MANIFESTS/$split.csv" ] || continue
  manifests+=("$MANIFESTS/$split.csv") predictions+=("$RUNS/predictions/$split.csv")
  # Labels of the private test exist only in the demo.
  answers="$DATA/organisers/${split}_labels.csv"
  if [ -f "$answers" ]; then labels+=("$answers"); else labels+=("$MANIFESTS/$split.csv"); fi
done
launch predict.py --manifest "${manifests[@]}" --experts "${experts[@]}" $flags "${weights[@]}" $PREDICT \
  --out "$RUNS/predictions" || [ $? -eq 1 ]

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
