#!/bin/sh
# Installs the C library, its headers, and what pkg-config and CMake need to find them.
#
#   packaging/install.sh [NAME=value ...]       NAME also as an environment variable
#
#   PREFIX      where it will be used           /usr/local
#   DESTDIR     put before all paths, for packages
#   LIBDIR      libraries, pkgconfig/, cmake/   PREFIX/lib
#   INCLUDEDIR  headers                         PREFIX/include
#   PROFILE     folder of the built libraries   target/capi/release
set -eu

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

for argument; do
    case $argument in
    PREFIX=* | DESTDIR=* | LIBDIR=* | INCLUDEDIR=* | PROFILE=*)
        eval "${argument%%=*}=\${argument#*=}" ;;
    *) fail "expected PREFIX, DESTDIR, LIBDIR, INCLUDEDIR or PROFILE=value, found $argument" ;;
    esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
LIBDIR=${LIBDIR:-${PREFIX%/}/lib}
INCLUDEDIR=${INCLUDEDIR:-${PREFIX%/}/include}
PROFILE=${PROFILE:-$root/target/capi/release}

# They are written into files that are read from anywhere.
for path in "$PREFIX" "$LIBDIR" "$INCLUDEDIR"; do
    case $path in
    /* | [A-Za-z]:[/\\]*) ;;
    *) fail "PREFIX, LIBDIR and INCLUDEDIR: expected absolute paths, found $path" ;;
    esac
done
PREFIX=${PREFIX%/}

number() {
    sed -n "s/^#define VMIX_ABI_$1 \([0-9]*\)\$/\1/p" "$root/include/vmix_types.h"
}
major=$(number MAJOR)
minor=$(number MINOR)
version=$(sed -n '/^\[workspace.package\]/,/^version/s/^version = "\(.*\)"$/\1/p' "$root/Cargo.toml")
[ -n "$major" ] && [ -n "$minor" ] || fail "include/vmix_types.h has no version of the ABI"
[ -n "$version" ] || fail "Cargo.toml has no version"

# What was built says what it is for, so that cross-compiled libraries can be installed too.
# Static libraries need what `rustc --print native-static-libs` lists; -lgcc_s and -lc of it every
# compiler adds, and the former would fail with -static.
static=libvmix.a
implib=
links=
if [ -f "$PROFILE/libvmix.so" ]; then
    built=libvmix.so
    shared=libvmix.so.$major.$minor
    links="libvmix.so.$major libvmix.so"
    soname=libvmix.so.$major
    flags='-lutil -lrt -lpthread -lm -ldl'
    native='util;rt;Threads::Threads;m;dl'
elif [ -f "$PROFILE/libvmix.dylib" ]; then
    built=libvmix.dylib
    shared=libvmix.$major.$minor.dylib
    links="libvmix.$major.dylib libvmix.dylib"
    soname=@rpath/libvmix.$major.dylib
    flags='-lpthread -lm'
    native='Threads::Threads;m'
elif [ -f "$PROFILE/vmix.dll" ]; then
    built=vmix.dll
    shared=vmix.dll
    flags='-lkernel32 -lntdll -luserenv -lws2_32 -ldbghelp'
    native='kernel32;ntdll;userenv;ws2_32;dbghelp'
    implib=libvmix.dll.a
    if [ -f "$PROFILE/vmix.dll.lib" ]; then # by the compiler of Microsoft
        implib=vmix.dll.lib
        static=vmix.lib
    fi
else
    fail "no library in $PROFILE: run \`make install\`, or set PROFILE"
fi
for name in $static $implib; do
    [ -f "$PROFILE/$name" ] ||
        fail "no $name in $PROFILE: run \`make install\`, or set PROFILE"
done

# A path below PREFIX as `$2` says it; others as they are.
below_prefix() {
    case $1 in
    "$PREFIX") printf '%s' "$2" ;;
    "$PREFIX"/*) printf '%s' "$2${1#"$PREFIX"}" ;;
    *) printf '%s' "$1" ;;
    esac
}

# From LIBDIR/cmake/vmix up to PREFIX: one step for each folder in between.
up=$(below_prefix "$LIBDIR/cmake/vmix" '' | sed 's|/[^/]\{1,\}|/..|g')
case $LIBDIR in
"$PREFIX" | "$PREFIX"/*) from_config="\${_vmix_folder}$up" ;;
*) from_config=$PREFIX ;;
esac
if [ -n "$implib" ]; then
    properties="IMPORTED_LOCATION \"$from_config/bin/$shared\""
    properties="$properties IMPORTED_IMPLIB \"\${_vmix_libdir}/$implib\""
else
    properties="IMPORTED_LOCATION \"\${_vmix_libdir}/$shared\" IMPORTED_SONAME \"$soname\""
fi

# Fills the template `$1`, into the file `$2`.
fill() {
    set -- "$1" "$2" "$root/packaging/$1"
    script=
    while read -r key value; do
        # What sed would take for more than itself.
        value=$(printf '%s' "$value" | sed 's/[\\&|]/\\&/g')
        script="${script}s|@$key@|$value|g
"
    done <<VALUES
PREFIX $PREFIX
LIBDIR $(below_prefix "$LIBDIR" '${prefix}')
INCLUDEDIR $(below_prefix "$INCLUDEDIR" '${prefix}')
VERSION $version
STATIC_NAME $static
NATIVE_FLAGS $flags
CMAKE_INCLUDEDIR $(below_prefix "$INCLUDEDIR" "$from_config")
CMAKE_SHARED_PROPERTIES $properties
CMAKE_NATIVE_LIBS $native
VALUES
    sed "$script" "$3" >"$2"
    chmod 644 "$2"
}

# Through a new file that is renamed: programs that run may have the old one mapped.
put() {
    cp "$2" "$3.new"
    chmod "$1" "$3.new"
    mv -f "$3.new" "$3"
}

libdir=$DESTDIR$LIBDIR
includedir=$DESTDIR$INCLUDEDIR
mkdir -p "$libdir/pkgconfig" "$libdir/cmake/vmix" "$includedir"
for header in vmix.h vmix_types.h vmix.hpp; do
    put 644 "$root/include/$header" "$includedir/$header"
done
put 644 "$PROFILE/$static" "$libdir/$static"
if [ -n "$implib" ]; then
    mkdir -p "$DESTDIR$PREFIX/bin"
    put 755 "$PROFILE/$built" "$DESTDIR$PREFIX/bin/$shared"
    put 644 "$PROFILE/$implib" "$libdir/$implib"
else
    put 755 "$PROFILE/$built" "$libdir/$shared"
    for link in $links; do
        ln -sf "$shared" "$libdir/$link"
    done
fi
fill vmix.pc.in "$libdir/pkgconfig/vmix.pc"
fill vmixConfig.cmake.in "$libdir/cmake/vmix/vmixConfig.cmake"
fill vmixConfigVersion.cmake.in "$libdir/cmake/vmix/vmixConfigVersion.cmake"
