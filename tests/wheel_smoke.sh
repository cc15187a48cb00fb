# What an installed package does without a clone: ./wheel_smoke.sh BIN, in an empty folder.
bin=$1
"$bin/squeeze-jax" train --list >presets.txt
grep -q '^klein_stage2 ' presets.txt
"$bin/python" -c "import squeeze_jax; print(squeeze_jax.__version__); squeeze_jax.Pipeline"
"$bin/squeeze-jax" sample --prompt "a critter on the beach" --steps 2 --out out.png
"$bin/squeeze-jax" train demo --workdir run --data.critters.train 64 --data.critters.held-out 8 \
  --training.stages.0.steps 2 --training.stages.1.steps 2 --optimizer.warmup-steps 1 \
  --training.validate-every 4 --training.sample-every 4 --log.grid 2 --log.score 0 \
  --data.batch-per-chip 8
"$bin/squeeze-jax" sample --checkpoint run --prompt "a critter" --steps 2 --out run.png
"$bin/squeeze-jax" export run --out exported
"$bin/squeeze-jax" evaluate --pairs 4 --out scores.json
if "$bin/squeeze-jax" extract nothing.json --out records --config demo 2>refused.txt; then exit 1; fi
grep -q 'nothing.json: no such file' refused.txt
for command in app plan data verify; do "$bin/squeeze-jax" $command --help >/dev/null; done
for made in out.png run.png run/metrics.jsonl exported/README.md scores.json; do test -s $made; done
