#compdef nbdkit nbdkit-mount
# Completion for nbdkit and nbdkit-mount in zsh: the program itself knows what can follow.
_nbdkit() {
    local -a whole whole_shown open open_shown
    local line candidate what shown
    for line in "${(@f)$("${(Q)words[1]}" --complete -- "${(Q)words[@]:0:$CURRENT}" 2>/dev/null)}"; do
        [[ -n $line ]] || continue
        candidate=${line%%$'\t'*}
        what=${line#*$'\t'}
        shown=$candidate${what:+  -- $what}
        if [[ $candidate == *[=/] ]]; then
            open+=("$candidate") open_shown+=("$shown")
        else
            whole+=("$candidate") whole_shown+=("$shown")
        fi
    done
    compadd -l -d whole_shown -a whole
    compadd -l -d open_shown -S '' -a open
}
if [[ $funcstack[1] == _nbdkit ]]; then _nbdkit "$@"; else compdef _nbdkit nbdkit nbdkit-mount; fi
