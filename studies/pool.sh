#!/usr/bin/env bash
# The tables of docs/results.md on few images of which whole sources are held out: frozen features, ensembles, the last
# blocks or the whole of CLIP ViT-B/16 fine-tuned, masking, and a small student.
#
#   bash studies/pool.sh pool/manifest.csv study                  on a CPU: the last two blocks, a third of the images, 2 epochs
#   FULL=1 bash studies/pool.sh pool/manifest.csv study           on a GPU: all blocks, all images, 4 epochs per stage
#
# The manifest has the columns split (train, holdout) and fold. Running it again continues. Further settings, as
# environment variables: CLIP, LITE0 and TINYVIT (files of weights; default: downloaded), PYTHON.
set -euo pipefail
images=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} CLIP=${CLIP:-hub} LITE0=${LITE0:-hub} TINYVIT=${TINYVIT:-hub} FULL=${FULL:-}
clip=timm:vit_base_patch16_clip_quickgelu_224.openai lite0=timm:tf_efficientnet_lite0 tinyvit=timm:tiny_vit_5m_224
mkdir -p "$out"

"$PYTHON" studies/features.py --images "$images" --train split=train --folds fold --out "$out/features" \
  --backbones "$clip" "$lite0" "$tinyvit" --weights-files "$clip=$CLIP" "$lite0=$LITE0" "$tinyvit=$TINYVIT"

combine() { "$PYTHON" -m data_prep.combine --no-duplicates-check "$@"; }
combine "$images" --where split=holdout --out "$out/test.csv"
settings=(weights="$CLIP" crop=center flip=0)
if [ "$FULL" ]; then
  combine "$images" --where split=train --holdout 0.05 --out "$out/train.csv"
  data=(--train "$out/train.csv" --val "$out/train.holdout.csv") tokens=()
  settings+=(epochs=4 learning_rate=2e-5)
else
  combine "$images" --where split=train --holdout 0.35 --out "$out/rest.csv"
  combine "$out/rest.csv" --holdout 0.08 --out "$out/unused.csv"
  data=(--train "$out/rest.holdout.csv" --val "$out/unused.holdout.csv")
  tokens=(--tokens "$out/features/${clip//:/_}/banks/scored")
  settings+=(finetune=last_n last_n=2 epochs=2 learning_rate=1e-4 head_learning_rate_factor=10)
fi
study() {
  "$PYTHON" studies/method.py --recipe clip_b16 --seeds 1 2 3 --draws 3 "${tokens[@]}" "${data[@]}" --test "$out/test.csv" \
    --policies --set "${settings[@]}" "$@"
}
study --out "$out/method" --stage2 continued "reading A (dense)" "reading B (crd)"
settings+=(mask_level=token)
study --out "$out/masking" --stage2 --masks "no mask" random smooth texture "random .25" "smooth .25" "texture .25"

banks="$out/features/${clip//:/_}/banks"
"$PYTHON" studies/student.py --images "$images" --train split=train --folds fold --out "$out/student" \
  --bank "$banks/both" --score "$banks/scored" --features class:6,8,10,12 mean:6,8,10,12 --recipe efficientnet_lite0 \
  --set weights="$LITE0" epochs=2 distill_views=distorted distill_target=clean
