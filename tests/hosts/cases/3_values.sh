# Arguments and variables arrive byte for byte.

# Words that some shell on the way would like to change.
nasty() {
  "$@" '' ' ' ' a  b ' "it's" '"quoted"' '$HOME' '`id`' '$(id)' '; exit 9' '| cat' '&' '> file' '\' \
    '\\' '\n' 'two
lines

' '	tab' '*' '?[a-z]' '~' '!!' '#' '{a,b}' '--' '-x' '--hostfile' 'A=B' '%s%n' ':' '\:' 'grüße, 世界' \
    "$(printf '\377\001\177\r')" "$(printf '%0100000d' 7)"
}

arguments() {
  nasty "$dsrun" "$here/whoami.lua" ranks >/dev/null 2>err
  sed 1,3d ranks/0 >expected
  grep -q 'argument 33, 100000 bytes' expected || wrong "not all was tried"
  rm ranks/0
  nasty runs 0 --hostfile hosts "$here/whoami.lua" ranks
  for rank in 0 1 2 3; do
    sed 1,3d ranks/$rank >got
    same "arguments of rank $rank" expected got
  done
}
it "nasty arguments arrive" arguments

# Exported by the shell: DS_… is passed on.
with_variables() {
  number=0
  command=$1
  shift
  for value in "$@"; do
    number=$((number + 1))
    export "DS_TEST_$number=$value"
  done
  $command
}

variables_of_the_shell() {
  (
    with_variables true "$@"
    "$dsrun" "$here/whoami.lua" ranks >/dev/null 2>err
    sed 1,3d ranks/0 >expected
    rm ranks/0
    runs 0 --hostfile hosts "$here/whoami.lua" ranks
    for rank in 0 1 2 3; do
      sed 1,3d ranks/$rank >got
      same "variables of rank $rank" expected got
    done
    printf '%s' "$mistakes" >mistakes
  )
  grep -q '10001[0-9] bytes' expected || wrong "not all was tried"
  mistakes=$mistakes$(cat mistakes)
}
it "nasty values of the shell's variables arrive" nasty variables_of_the_shell

# values_are LINE…: what each rank finds in DS_TEST_…
values_are() {
  printf '%s\n' "$@" >expected
  for rank in 0 1 2 3; do
    sed -e 1,3d -e 's/^[0-9]* bytes: //' ranks/$rank >got
    same "variables of rank $rank" expected got
  done
}

variables_of_files() {
  cat >~/.deepspeed_env <<'END'
# everywhere
DS_TEST_HOME=from the home
export DS_TEST_BOTH=home

DS_TEST_SHELL=file
END
  printf 'DS_TEST_BOTH=here\r\nDS_TEST_QUOTED="a \\"b\\" $c"\nDS_TEST_X=a=b #c\n' >.deepspeed_env
  export DS_TEST_SHELL=shell
  runs 0 --hostfile hosts "$here/whoami.lua" ranks
  values_are DS_TEST_BOTH=here DS_TEST_HOME='from the home' 'DS_TEST_QUOTED=a "b" $c' \
    DS_TEST_SHELL=file DS_TEST_X=a=b
  echo "DS_TEST_ONLY='this'" >another
  export DS_ENV_FILE=another
  runs 0 --hostfile hosts "$here/whoami.lua" ranks
  values_are DS_TEST_ONLY=this DS_TEST_SHELL=shell
  printf 'DS_TEST_A=1\nnonsense\n' >another
  runs 2 --hostfile hosts "$here/whoami.lua" ranks
  says 'another:2'
  unset DS_ENV_FILE DS_TEST_SHELL
  rm ~/.deepspeed_env
}
it "variables of .deepspeed_env and DS_ENV_FILE arrive" variables_of_files
