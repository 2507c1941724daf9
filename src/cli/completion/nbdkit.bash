# Completion for nbdkit and nbdkit-mount in bash: the program itself knows what can follow.
_nbdkit() {
    local rest=$COMP_LINE words=() i word
    # bash takes words apart at "=" and ":"; the program wants them whole.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $i -eq 0 || $rest == [[:space:]]* ]]; then
            rest=${rest#"${rest%%[![:space:]]*}"}
            words+=("")
        fi
        rest=${rest#"$word"}
        words[-1]+=${word//[\\\"\']/}
    done
    local current=${words[-1]} skip
    # Only what follows the last place where bash took the word apart is replaced.
    skip=${current%"${2//[\\\"\']/}"}
    local line candidate
    COMPREPLY=()
    while IFS= read -r line; do
        candidate=${line%%$'\t'*}
        candidate=${candidate#"$skip"}
        printf -v candidate %q "$candidate"
        COMPREPLY+=("$candidate")
    done < <("$1" --complete -- "${words[@]}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _nbdkit nbdkit nbdkit-mount
