#!/bin/sh
# Start the run, or go on with the one that the folder holds; leave one that has reached its end alone.
# The arguments are those of `rustyrl learner`; with --resume, a run that has reached its end goes on too.
set -eu
run="runs/${RUSTYRL_RUN:-run}"
case " $* " in
*" --resume "*) ;;
*)
    if grep -Eqs '"stopped_by": "(goal|total_steps|max_seconds)"' "$run/summary.json"; then
        echo "$run has reached its end: set RUSTYRL_RUN to another name, or add --resume and a later end" >&2
        exit 0
    fi
    if [ -f "$run/config.toml" ]; then
        set -- "$@" --resume
    fi
    ;;
esac
exec rustyrl learner --listen ipc:///link/learner --run "$run" "$@"
