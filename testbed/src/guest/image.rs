//! The guest image: built once from Debian packages, cached by a hash of its recipe.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

use crate::progress::Progress;

/// The recipe travels inside this program, so that the cache key and the files agree.
const RECIPE: [(&str, &str); 9] = [
    ("build-image.sh", include_str!("../../guest/build-image.sh")),
    ("init", include_str!("../../guest/init")),
    ("service", include_str!("../../guest/service")),
    ("use", include_str!("../../guest/use")),
    ("load/main.rs", include_str!("../../guest/load/main.rs")),
    ("load/memory.rs", include_str!("../../guest/load/memory.rs")),
    ("load/worker.rs", include_str!("../../guest/load/worker.rs")),
    ("load/serve.rs", include_str!("../../guest/load/serve.rs")),
    ("load/redis.rs", include_str!("../../guest/load/redis.rs")),
];

/// Images of older recipes that are kept beside the one in use.
const OLD_IMAGES_MAX: usize = 2;

/// A built image in the cache.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
    key: String,
}

impl Image {
    /// The image of this program's recipe: from the cache, else built now (half a minute).
    ///
    /// # Errors
    /// When a tool is missing or a package cannot be had; the text names the build's log.
    pub fn ready(progress: &Progress) -> anyhow::Result<Self> {
        let key = recipe_key();
        let cache = cache_folder();
        let folder = cache.join(format!("image-{key}"));
        let _lock = lock(&cache, "image.lock")?;
        if !folder.join("disk.img").exists() {
            progress.step("building the guest image from Debian packages (once, about 30 s)");
            build(&cache, &folder)?;
            remove_old(&cache, &folder)?;
        }
        Ok(Self { folder, key })
    }

    /// Debian's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The initrd, which is also the whole small guest.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }

    /// The root disk, never written.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk.img")
    }

    /// Where what depends on this image is kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names the recipe.
    pub fn key(&self) -> &str {
        &self.key
    }
}

/// Images and saved states: `$XDG_CACHE_HOME/scaleaway-lab`, else `/var/cache/scaleaway-lab`.
pub(crate) fn cache_folder() -> PathBuf {
    match std::env::var_os("XDG_CACHE_HOME") {
        Some(home) if !home.is_empty() => PathBuf::from(home).join("scaleaway-lab"),
        _ => PathBuf::from("/var/cache/scaleaway-lab"),
    }
}

/// Holds a lock file until the returned file is dropped; dies with its process.
pub(crate) fn lock(folder: &Path, name: &str) -> anyhow::Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(name);
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    flock(&file, FlockOperation::LockExclusive)
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// A short name for anything that can be hashed.
pub(crate) fn short_key(value: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn recipe_key() -> String {
    short_key(&RECIPE)
}

/// Builds beside the final place and renames, so that a broken build is never taken for an image.
fn build(cache: &Path, folder: &Path) -> anyhow::Result<()> {
    let work = cache.join("image-in-work");
    if work.exists() {
        fs::remove_dir_all(&work).context("cannot remove a broken build")?;
    }
    let recipe = work.join("recipe");
    fs::create_dir_all(recipe.join("load"))?;
    for (name, text) in RECIPE {
        fs::write(recipe.join(name), text)?;
    }
    let log = cache.join("image-build.log");
    let program = work.join("guestload");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut compile = Command::new(rustc);
    compile
        .args([
            "--edition",
            "2024",
            "-C",
            "opt-level=2",
            "-C",
            "panic=abort",
        ])
        .args([
            "-C",
            "strip=symbols",
            "-C",
            "target-feature=+crt-static",
            "-o",
        ])
        .arg(&program)
        .arg(recipe.join("load/main.rs"));
    run(&mut compile, &log).context("cannot compile the program inside the guest")?;
    let mut assemble = Command::new("sh");
    assemble
        .arg(recipe.join("build-image.sh"))
        .arg(&recipe)
        .arg(&program)
        .arg(&work);
    run(&mut assemble, &log).context("cannot build the guest image")?;
    fs::rename(&work, folder).context("cannot put the image in its place")
}

fn run(command: &mut Command, log: &Path) -> anyhow::Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(5).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!(
            "{status}; {} ends with:\n{}",
            log.display(),
            tail.join("\n")
        );
    }
    Ok(())
}

/// Removes images that have not been used for longest.
fn remove_old(cache: &Path, in_use: &Path) -> anyhow::Result<()> {
    let mut old = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let is_image = entry.file_name().to_string_lossy().starts_with("image-");
        if is_image && entry.file_type()?.is_dir() && entry.path() != in_use {
            old.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    old.sort();
    for (_, path) in old.iter().rev().skip(OLD_IMAGES_MAX) {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
