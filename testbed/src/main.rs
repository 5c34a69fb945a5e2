//! The lab's program; see `testbed::cli`.

fn main() -> std::process::ExitCode {
    testbed::cli::main()
}
