#compdef dinoreg
# Completion of dinoreg for zsh: eval "$(dinoreg completion zsh)", behind compinit
_dinoreg() {
  local -a found
  found=("${(@f)$(dinoreg completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  compadd -Q -S '' -- ${(M)found:#*[=/.,]}
  compadd -Q -- ${found:#*[=/.,]}
}
compdef _dinoreg dinoreg
