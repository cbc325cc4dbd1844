# Completion of dinoreg for bash: eval "$(dinoreg completion bash)"
_dinoreg() {
  local line="${COMP_LINE:0:COMP_POINT}" word current
  local -a typed=()
  read -ra typed <<< "$line"
  [[ $line == *[[:space:]] ]] && typed+=("")
  current="${typed[${#typed[@]}-1]}"
  local before="${current%"${current##*[=:]}"}"  # bash takes these for the ends of words
  COMPREPLY=()
  while IFS= read -r word; do
    COMPREPLY+=("${word#"$before"}")
  done < <(dinoreg completion words "${typed[@]:1}" 2>/dev/null)
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.,] ]] && type compopt >/dev/null 2>&1 && compopt -o nospace
}
complete -F _dinoreg dinoreg
