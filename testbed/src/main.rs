//! The lab's command line.

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(done) = testbed::internal::run(&arguments) {
        return done;
    }
    anyhow::bail!("no such verb")
}
