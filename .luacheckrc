std = "luajit"
max_line_length = 100
files["tests/lua/**/*_spec.lua"] = { std = "+busted" }
files["tests/lua/*_spec.lua"] = { std = "+busted" }
files["tests/cuda/*_spec.lua"] = { std = "+busted" }
