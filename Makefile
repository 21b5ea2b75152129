# The same few commands for everyday work and for CI. `make demo` and `make test` need only Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Made again when a dependency or pin changes.
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-avx2 test-min check format docs gpu-bundle gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup $(VENV)
	@touch $@

demo: setup
	$(BIN)/darseg demo

# Each file of tests runs in one process, which makes what its tests share once; tests/conftest.py orders the files. One
# thread each: otherwise they wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Numeric tests again with the kernels of a processor without AVX-512, for processors that have more.
NUMERIC := $(addprefix tests/test_,stage.py methods.py recompute.py networks.py convolutions.py protocol.py \
  convert.py::test_converted_checkpoints_answer_as_released)
test-avx2: setup
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	  -m "not slow" $(NUMERIC)

# Tests that use every dependency as darseg does – all formats of images, recipes, weights, a run with its report, the
# viewer, an exported network, timm – with the lowest versions that pyproject.toml allows (constraints-min.txt).
UNITS := $(addprefix tests/test_,files_and_classes.py config.py weights.py run.py::test_a_run_leaves_exactly_these_files \
  $(addprefix formats.py::test_,images_of_other_formats_are_read color_images_are_read_without_alpha \
    palette_images_become_rgb gray_images_become_rgb bands_are_chosen tiffs_are_turned_upright gif_masks_are_indices \
    sbd_files_are_read colors_are_read_as_classes) \
  rasterize.py::test_coco_polygons_are_drawn_as_pycocotools_draws_them \
  compare_page.py::test_all_files_are_written_and_written_again_the_same \
  $(addprefix predict.py::test_,all_kinds_are_of_one_prediction a_video_becomes_numbered_frames_and_a_video) \
  $(addprefix networks.py::test_,timm_brings_its_own_mean_and_std stochastic_depth_acts_in_training_only \
    backbones_that_dpt_cannot_take timm_networks_that_do_not_exist_or_do_not_dilate) \
  $(addprefix view.py::test_,pictures_agree_with_the_files requests_without_the_token_are_refused \
    connections_without_a_request_are_closed_and_limited marks_are_stored_in_the_run_folder) \
  $(addprefix export.py::test_,files_give_the_networks_logits_at_any_size metadata))
test-min: setup
	scripts/setup_min .venv-min $(VENV)
	PYTHONPATH=src OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 \
	  --dist loadfile $(UNITS)

check: setup
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ty check

format: setup
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

# Writes the site to site/. A link or a name that leads nowhere is an error. Open site/index.html from disk, or serve it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Everything that only a GPU can show, in 9 minutes on a machine that may have no network: `make gpu-bundle` here fills
# .gpu/, then the tree goes there, where `make gpu` needs Python 3.10 and torch alone. DRY=1: the same, tiny, on the CPU,
# as CI does it.
gpu-bundle: setup
	$(BIN)/python scripts/gpu_bundle.py

gpu: $(if $(DRY),setup)
	$(if $(DRY),$(BIN)/python,$(PYTHON)) scripts/gpu.py runs/gpu $(if $(DRY),--dry)

clean:
	rm -rf $(VENV) .venv-min build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
