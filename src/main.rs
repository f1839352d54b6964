//! The command `vmix`, for those who build it with cargo; `pip install` brings the same.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmix::cli::run(std::env::args_os())
}
