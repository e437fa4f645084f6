#!/usr/bin/env bash
# The demo's tests in headless Chromium: `tests/demo/run_in_chromium.sh [screenshot.png]`, in an environment with
# ddt-fast and pytest. Installs Debian's chromium (as root), gradio and playwright where they are missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq -y chromium; }
python -c "import gradio, playwright" 2>/dev/null || pip install --quiet -e ".[demo]" "playwright>=1.50"
if [ $# -gt 0 ]; then export DDT_DEMO_SCREENSHOT=$1; fi
# A file's tests share one demo and one browser, and so one worker; the slow files do not come last.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/demo
