//! The command `vmix`.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error as StdError,
    ffi::OsString,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use crate::{
    Adapter, ApplyTo, Base, Checkpoint, DType, InitOptions, LabelKey, Labels, Layers, Opened,
    ProjectionKind, Selection, Start, ValueWeights, Values, error::presentable, init_adapter, open,
};

/// Characters of a file's own words in a table; they do not speak to the terminal.
const LONGEST: usize = 2000;

type Result<T> = std::result::Result<T, Box<dyn StdError>>;

/// Make, inspect and convert VMix aesthetics adapters for Stable Diffusion.
///
/// An adapter holds aesthetic labels and the weights that turn any choice of them into values of a
/// U-Net's cross-attention; a preset holds the values of one choice. Both are safetensors files.
///
/// The exit status is 0 when all went well, 1 with a sentence on standard error when something was
/// refused, 2 when the command line itself was wrong, and 130 when it was stopped by Ctrl-C.
#[derive(Parser)]
#[command(name = "vmix", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Init(Init),
    Inspect(Inspect),
    Bake(Bake),
    Convert(Convert),
    Validate(Validate),
}

/// Make a new adapter from a checkpoint and a list of labels
///
/// The text encoders of the checkpoint turn every label's text and its negative into AesEmb (paper,
/// eq. 4). The rest is where training starts from: the projection changes nothing, and the value
/// weights are copies of the checkpoint's own. An untrained adapter changes no image.
///
/// EXPERIMENTAL: with --training-free the file works at once, on any checkpoint of the same kind, as
/// the difference of every label's text to its negative, through the checkpoint's own value weights. It
/// is not the trained adapter of the paper: coarser than the same word in the prompt.
///
/// Examples:
///
///   vmix init --base sd15.safetensors --out adapter.safetensors
///
///   vmix init --base sdxl.safetensors --labels labels.toml --dtype float16 --out adapter.safetensors
///
///   vmix init --base sd15.safetensors --label "warm light" --label "red: bright red | grey"
///   --training-free --out warm.safetensors
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Init {
    /// The checkpoint: a .safetensors file with the names of LDM, as ComfyUI loads, or the folder of a
    /// diffusers pipeline. SD1.5 and SDXL are told apart by their tensors.
    #[arg(short, long, value_name = "CHECKPOINT")]
    base: PathBuf,
    /// A labels.toml: tables `[[label]]` with `name` and, where wanted, `dimension`, `positive` (the
    /// text, else the name), `negative` (else a rare token), `default` and `neutral` (weights) and
    /// `display_names` (by language). Without it, and without --label, seven default labels.
    #[arg(short = 'L', long, value_name = "FILE", conflicts_with = "label")]
    labels: Option<PathBuf>,
    /// A label as "NAME", "NAME: TEXT" or "NAME: TEXT | NEGATIVE"; may be repeated.
    #[arg(short, long, value_name = "LABEL")]
    label: Vec<String>,
    /// EXPERIMENTAL: a file that works without training.
    #[arg(long)]
    training_free: bool,
    /// Element type of the value weights; without it, that of the checkpoint.
    #[arg(long, value_enum, conflicts_with = "training_free")]
    dtype: Option<Float>,
    /// Seed of the projection's initial weights.
    #[arg(long, default_value_t = 0, conflicts_with = "training_free")]
    seed: u64,
    #[command(flatten)]
    out: Out,
}

/// Say what a file is: kind, base, labels, layers, dtype, size, training, modelspec.
#[derive(Args)]
struct Inspect {
    /// An adapter or a preset.
    file: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Compute the values of one choice of labels and write them as a preset
///
/// A preset is what a host needs that only generates: it loads without any computation.
///
/// Example:
///
///   vmix bake adapter.safetensors --select "vibrant color" --select "sharp focus=0.5"
///   --out vivid.safetensors
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Bake {
    /// The adapter.
    adapter: PathBuf,
    /// A label, as "NAME" or "NAME=WEIGHT"; may be repeated. Labels not named are at weight 0. "all" is
    /// every label at 1, "none" every label at 0. Without it, every label at the file's own default.
    #[arg(short, long, value_name = "LABEL")]
    select: Vec<String>,
    /// The checkpoint whose value weights serve, for adapters that have none of their own.
    #[arg(short, long, value_name = "CHECKPOINT")]
    base: Option<PathBuf>,
    /// What the unconditional pass of classifier-free guidance sees; without it, what the file says.
    #[arg(long, value_enum)]
    apply_to: Option<Passes>,
    /// Element type of the values.
    #[arg(long, value_enum, default_value_t = Float::Float32)]
    dtype: Float,
    #[command(flatten)]
    out: Out,
}

/// Write a file anew with its value weights, or its values, in another element type.
///
/// AesEmb and the projection stay as they are: they are small, and every layer goes through them.
/// Training-free adapters have no value weights, and nothing to convert.
#[derive(Args)]
struct Convert {
    /// An adapter or a preset.
    file: PathBuf,
    /// Element type to convert to. Values that it cannot hold are refused.
    #[arg(long, value_enum)]
    dtype: Float,
    #[command(flatten)]
    out: Out,
}

/// Read files completely and check all that the format asks for.
#[derive(Args)]
struct Validate {
    /// Adapters and presets.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

#[derive(Args)]
struct Out {
    /// The file to write, whole or not at all.
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    path: PathBuf,
    /// Replace the file if there is one.
    #[arg(short, long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Float {
    #[value(aliases = ["fp32", "f32"])]
    Float32,
    #[value(aliases = ["fp16", "f16"])]
    Float16,
    #[value(aliases = ["bf16"])]
    Bfloat16,
}

impl From<Float> for DType {
    fn from(float: Float) -> Self {
        match float {
            Float::Float32 => Self::F32,
            Float::Float16 => Self::F16,
            Float::Bfloat16 => Self::BF16,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Passes {
    Cond,
    Both,
    Contrast,
}

impl From<Passes> for ApplyTo {
    fn from(passes: Passes) -> Self {
        match passes {
            Passes::Cond => Self::Cond,
            Passes::Both => Self::Both,
            Passes::Contrast => Self::Contrast,
        }
    }
}

/// Runs the command with these arguments, the first of which is its own name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(status(arguments))
}

/// [`run`], and the exit status as a number.
pub fn status(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let printed = error.print();
            return match error.use_stderr() {
                true => 2,
                false => reported(said(printed)),
            };
        }
    };
    remove_temporary_files_when_stopped();
    reported(match cli.command {
        Command::Init(arguments) => init(&arguments),
        Command::Inspect(arguments) => inspect(&arguments),
        Command::Bake(arguments) => bake(&arguments),
        Command::Convert(arguments) => convert(&arguments),
        Command::Validate(arguments) => validate(&arguments),
    })
}

/// Where something else handles signals, it does. What is ignored stays ignored, as nohup wants it.
fn remove_temporary_files_when_stopped() {
    // The crate installs no handler at all where one of its signals is not at its default. Elsewhere
    // than on Linux that stays so.
    #[cfg(target_os = "linux")]
    let ignored: Vec<libc::c_int> = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP]
        .into_iter()
        // SAFETY: plain calls, without functions of ours.
        .filter(|signal| unsafe {
            let mut action = std::mem::zeroed::<libc::sigaction>();
            let known = libc::sigaction(*signal, std::ptr::null(), &raw mut action) == 0;
            known && action.sa_sigaction == libc::SIG_IGN
        })
        .collect();
    #[cfg(target_os = "linux")]
    for signal in &ignored {
        // SAFETY: as above.
        unsafe { libc::signal(*signal, libc::SIG_DFL) };
    }
    let _ = ctrlc::try_set_handler(|| {
        crate::file::unfinished::remove();
        std::process::exit(130); // what shells say of programs that Ctrl-C ended
    });
    #[cfg(target_os = "linux")]
    for signal in ignored {
        // SAFETY: as above.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// The exit status; what went wrong is said.
fn reported(done: Result<()>) -> u8 {
    match done {
        Ok(()) => 0,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            1
        }
    }
}

fn init(arguments: &Init) -> Result<()> {
    let inputs = [Some(&arguments.base), arguments.labels.as_ref()];
    arguments.out.check(inputs.into_iter().flatten())?;
    let start = match arguments.training_free {
        false => Start::Training,
        true => Start::TrainingFree,
    };
    let labels = match &arguments.labels {
        Some(path) => Labels::open_toml(path, start)?,
        None if arguments.label.is_empty() => Labels::standard(start),
        None => Labels::from_entries(arguments.label.iter().map(String::as_str), start)?,
    };
    let base = Checkpoint::open(&arguments.base)?;
    for warning in base.text_encoder()?.warnings(&labels, start)? {
        let _ = writeln!(io::stderr(), "warning: {}", presentable(&warning, LONGEST));
    }
    let options = InitOptions {
        start,
        dtype: arguments.dtype.map(DType::from),
        seed: arguments.seed,
    };
    let bar = progress("encoding labels");
    let adapter = init_adapter(&base, &labels, &options, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    arguments.out.write("writing", |path| adapter.save(path))?;
    say(&format!(
        "{}: {}",
        arguments.out.path.display(),
        Summary::of_adapter(&adapter, arguments.out.size()?).sentence()
    ))
}

fn bake(arguments: &Bake) -> Result<()> {
    let inputs = [Some(&arguments.adapter), arguments.base.as_ref()];
    arguments.out.check(inputs.into_iter().flatten())?;
    let adapter = Adapter::open(&arguments.adapter)?;
    let selection = selection(&arguments.select, adapter.labels())?;
    let apply_to = arguments.apply_to.map_or(adapter.apply_to(), ApplyTo::from);
    let dtype = arguments.dtype.into();
    let bar = spinner("computing values");
    let values = match &arguments.base {
        None if adapter.value_weights() == ValueWeights::Base => {
            let found = arguments.adapter.display();
            return Err(format!(
                "{found}: this adapter has no value weights of its own: say --base CHECKPOINT, \
                 whose W_V are to serve"
            )
            .into());
        }
        None => adapter.values(&selection, apply_to, dtype)?,
        Some(base) => adapter.values_on(&Checkpoint::open(base)?, &selection, apply_to, dtype)?,
    };
    bar.finish_and_clear();
    arguments.out.write("writing", |path| values.save(path))?;
    say(&format!(
        "{}: {}",
        arguments.out.path.display(),
        Summary::of_preset(&values, arguments.out.size()?).sentence()
    ))
}

/// The labels and weights that were named, or the file's defaults.
fn selection(given: &[String], labels: &Labels) -> Result<Selection> {
    match given {
        [] => return Ok(Selection::Default),
        [one] if one == "all" => return Ok(Selection::All),
        [one] if one == "none" => return Ok(Selection::None),
        _ => (),
    }
    let chosen = given.iter().map(|entry| -> Result<(LabelKey, f32)> {
        let is_label = |name: &str| labels.index(&LabelKey::from(name)).is_ok();
        match entry.rsplit_once('=') {
            // Names may have that sign themselves.
            Some((name, weight)) if !is_label(entry) => {
                let name = name.trim();
                if Labels::RESERVED.contains(&name) {
                    return Err(format!("--select {entry:?}: `{name}` takes no weight").into());
                }
                let number = weight.trim().parse::<f32>().ok().filter(|w| w.is_finite());
                let number = number.ok_or_else(|| {
                    format!(
                        "--select {entry:?}: expected NAME=WEIGHT with a finite number, found \
                         {weight:?} as weight"
                    )
                })?;
                Ok((LabelKey::from(name), number))
            }
            _ if Labels::RESERVED.contains(&entry.as_str()) => {
                Err(format!("--select {entry:?}: stands alone, without other labels").into())
            }
            _ => Ok((LabelKey::from(entry.as_str()), 1.0)),
        }
    });
    let chosen: Vec<_> = chosen.collect::<Result<_>>()?;
    for (i, (label, _)) in chosen.iter().enumerate() {
        if chosen[..i].iter().any(|(other, _)| other == label) {
            return Err(format!("--select {:?}: that label is selected twice", given[i]).into());
        }
    }
    Ok(Selection::Weights(chosen))
}

fn convert(arguments: &Convert) -> Result<()> {
    arguments.out.check([])?; // in place is as meant
    let dtype = arguments.dtype.into();
    let bar = spinner("converting");
    let summary = match open(&arguments.file)? {
        Opened::Adapter(adapter) => {
            let adapter = adapter.to_dtype(dtype)?;
            bar.finish_and_clear();
            arguments.out.write("writing", |path| adapter.save(path))?;
            Summary::of_adapter(&adapter, arguments.out.size()?)
        }
        Opened::Preset(values) => {
            let values = values.to_dtype(dtype)?;
            bar.finish_and_clear();
            arguments.out.write("writing", |path| values.save(path))?;
            Summary::of_preset(&values, arguments.out.size()?)
        }
    };
    say(&format!(
        "{}: {}",
        arguments.out.path.display(),
        summary.sentence()
    ))
}

fn validate(arguments: &Validate) -> Result<()> {
    let mut refused = 0;
    for path in &arguments.files {
        let bar = spinner("checking");
        let found = open(path).and_then(|opened| match opened {
            Opened::Adapter(adapter) => adapter
                .validate()
                .map(|()| valid("adapter", adapter.metadata())),
            // It is read as a whole.
            Opened::Preset(values) => Ok(valid("preset", &values.metadata())),
        });
        bar.finish_and_clear();
        match found {
            Ok(what) => say(&format!("{}: {what}", path.display()))?,
            Err(error) if arguments.files.len() == 1 => return Err(error.into()),
            Err(error) => {
                refused += 1;
                let _ = writeln!(io::stderr(), "error: {error}");
            }
        }
    }
    match refused {
        0 => Ok(()),
        _ => Err(format!("{refused} of {} files refused", arguments.files.len()).into()),
    }
}

fn valid(kind: &str, metadata: &BTreeMap<String, String>) -> String {
    match is_experimental(metadata) {
        true => format!("a valid {kind} (EXPERIMENTAL, training-free)"),
        false => format!("a valid {kind}"),
    }
}

fn is_experimental(metadata: &BTreeMap<String, String>) -> bool {
    metadata.get("vmix.projection").map(String::as_str) == Some(ProjectionKind::Difference.name())
}

fn inspect(arguments: &Inspect) -> Result<()> {
    let size = fs::metadata(&arguments.file).map_or(0, |metadata| metadata.len());
    let summary = match open(&arguments.file)? {
        Opened::Adapter(adapter) => Summary::of_adapter(&adapter, size),
        Opened::Preset(values) => Summary::of_preset(&values, size),
    };
    say(&if arguments.json {
        serde_json::to_string_pretty(&summary.0)?
    } else {
        summary.table()?
    })
}

/// What `inspect --json` prints; the table is made from it. Keys are only ever added.
struct Summary(Value);

impl Summary {
    fn of_adapter(adapter: &Adapter, bytes: u64) -> Self {
        let mut summary = Self::new(
            "adapter",
            adapter.base(),
            adapter.labels(),
            adapter.layers(),
            adapter.metadata(),
        );
        summary.extend(json!({
            "projection": adapter.projection().name(),
            "value_weights": adapter.value_weights().name(),
            "dtype": adapter.dtype().map(DType::name),
            "context_tokens": adapter.context_tokens(),
            "context_dim": adapter.context_dim(),
            "apply_to": adapter.apply_to().name(),
            "bytes": bytes,
        }));
        summary
    }

    fn of_preset(values: &Values, bytes: u64) -> Self {
        let names = values.labels().iter().map(|label| label.name.clone());
        let selection: serde_json::Map<String, Value> = names
            .zip(values.weights().iter().map(|&weight| short(weight)))
            .collect();
        let mut summary = Self::new(
            "preset",
            values.base(),
            values.labels(),
            values.layers(),
            &values.metadata(),
        );
        summary.extend(json!({
            "selection": selection,
            "projection": values.metadata().get("vmix.projection"),
            "dtype": values.dtype().name(),
            "context_tokens": values.context_tokens(),
            "apply_to": values.apply_to().name(),
            "origin": values.origin(),
            "bytes": bytes,
        }));
        summary
    }

    fn new(
        kind: &str,
        base: Base,
        labels: &Labels,
        layers: &Layers,
        metadata: &BTreeMap<String, String>,
    ) -> Self {
        let labels: Vec<Value> = labels
            .iter()
            .map(|label| {
                json!({
                    "name": label.name, "dimension": label.dimension,
                    "positive": label.positive, "negative": label.negative,
                    "default": short(label.default), "neutral": label.neutral.map(short),
                    "display_names": label.display_names,
                })
            })
            .collect();
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| {
                json!({
                    "name": layer.name, "ldm_name": layer.ldm_name,
                    "inner_dim": layer.inner_dim,
                })
            })
            .collect();
        let training = metadata.get("vmix.trained").map_or("no", String::as_str);
        Self(json!({
            "kind": kind, "base": base.name(), "labels": labels, "layers": layers,
            "trained": training != "no", "training": training,
            "experimental": is_experimental(metadata),
            "metadata": metadata,
        }))
    }

    fn extend(&mut self, more: Value) {
        let (Value::Object(own), Value::Object(more)) = (&mut self.0, more) else {
            unreachable!("both are objects")
        };
        own.extend(more);
    }

    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or("")
    }

    /// What kind of adapter or preset it is, in words.
    fn what(&self) -> String {
        let training = match (self.0["experimental"] == true, self.0["trained"] == true) {
            (true, _) => "training-free",
            (_, false) => "untrained",
            (_, true) => "trained",
        };
        let what = match self.text("kind") {
            "preset" => format!("preset of {training} labels"),
            kind => format!("{training} {kind}"),
        };
        match self.0["experimental"] == true {
            true => format!("{what} (EXPERIMENTAL)"),
            false => what,
        }
    }

    fn size(&self) -> String {
        bytes(self.0["bytes"].as_u64().unwrap_or(0))
    }

    fn count(&self, key: &str) -> usize {
        self.0[key].as_array().map_or(0, Vec::len)
    }

    fn sentence(&self) -> String {
        let (base, labels, layers) = (
            self.text("base"),
            self.count("labels"),
            self.count("layers"),
        );
        let (what, size) = (self.what(), self.size());
        let plural = if labels == 1 { "" } else { "s" };
        format!("{what} for {base}, {labels} label{plural}, {layers} layers, {size}")
    }

    fn table(&self) -> Result<String> {
        let mut rows = vec![
            ("kind", self.what()),
            ("base", self.text("base").to_owned()),
            ("trained", self.text("training").to_owned()),
        ];
        for key in ["projection", "value_weights"] {
            if self.0[key].is_string() {
                rows.push((key, self.text(key).to_owned()));
            }
        }
        let context = match &self.0["context_dim"] {
            Value::Null => format!("{} tokens", self.0["context_tokens"]),
            dim => format!("{} tokens of width {dim}", self.0["context_tokens"]),
        };
        let dtype = match &self.0["dtype"] {
            Value::Null if self.text("value_weights") == "own" => "mixed".to_owned(),
            Value::Null => "the base's own".to_owned(),
            _ => self.text("dtype").to_owned(),
        };
        rows.extend([
            ("dtype", dtype),
            ("size", self.size()),
            ("layers", self.count("layers").to_string()),
            ("context", context),
            ("apply_to", self.text("apply_to").to_owned()),
        ]);
        if self.0["origin"].is_string() {
            rows.push(("origin", self.text("origin").to_owned()));
        }
        let metadata = self.0["metadata"].as_object();
        for (key, value) in metadata.into_iter().flatten() {
            if let Some(name) = key.strip_prefix("modelspec.") {
                rows.push((name, value.as_str().unwrap_or("").to_owned()));
            }
        }
        let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 2;
        let mut table = String::new();
        for (key, value) in rows {
            // What others wrote into a file must not move the cursor.
            writeln!(table, "{key:width$}{}", presentable(&value, LONGEST))?;
        }
        write!(table, "\n{}", self.label_table())?;
        let languages = self.languages();
        if !languages.is_empty() {
            write!(table, "\n\nnames in {}", presentable(&languages, LONGEST))?;
        }
        Ok(table)
    }

    /// The languages that any label has a name in.
    fn languages(&self) -> String {
        let labels = self.0["labels"].as_array().into_iter().flatten();
        let names = labels.filter_map(|label| label["display_names"].as_object());
        let tags: BTreeSet<&str> = names.flat_map(|n| n.keys().map(String::as_str)).collect();
        tags.into_iter().collect::<Vec<_>>().join(", ")
    }

    fn label_table(&self) -> String {
        let weights = if self.text("kind") == "preset" {
            "weight"
        } else {
            "default"
        };
        let mut rows =
            vec![["label", "dimension", weights, "positive", "negative"].map(String::from)];
        for label in self.0["labels"].as_array().into_iter().flatten() {
            let text = |key: &str| presentable(label[key].as_str().unwrap_or(""), LONGEST);
            let weight = match &self.0["selection"] {
                Value::Null => &label["default"],
                selection => &selection[label["name"].as_str().unwrap_or("")],
            };
            let quoted = |key: &str| match text(key) {
                text if text.is_empty() => "(no text)".to_owned(),
                text => text,
            };
            rows.push([
                text("name"),
                text("dimension"),
                weight.to_string(),
                quoted("positive"),
                quoted("negative"),
            ]);
        }
        let widths: Vec<usize> = (0..5)
            .map(|column| {
                let cells = rows.iter().map(|row| row[column].width());
                cells.max().unwrap_or(0) + 2
            })
            .collect();
        let lines = rows.iter().map(|row| {
            let cells = row.iter().zip(&widths);
            let line: String = cells
                .map(|(cell, &width)| format!("{cell}{}", " ".repeat(width - cell.width())))
                .collect();
            line.trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// A weight as its shortest decimal, 0.1 and not 0.10000000149011612.
fn short(weight: f32) -> Value {
    serde_json::from_str(&weight.to_string()).unwrap_or(Value::Null)
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["bytes", "kB", "MB", "GB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} bytes"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

impl Out {
    /// Refuses to write where a file is, or over what is read, before any work is done.
    fn check<'a>(&self, inputs: impl IntoIterator<Item = &'a PathBuf>) -> Result<()> {
        let path = self.path.display();
        if let Ok(target) = self.path.canonicalize() {
            for input in inputs {
                if input
                    .canonicalize()
                    .is_ok_and(|input| target.starts_with(input))
                {
                    let input = input.display();
                    return Err(format!("{path}: is, or is in, what is read: {input}").into());
                }
            }
        }
        if self.path.is_dir() {
            return Err(format!("{path}: a folder; expected the name of a file to write").into());
        }
        // A link that leads nowhere is something, too.
        if self.path.symlink_metadata().is_ok() && !self.force {
            return Err(format!("{path}: there is a file already; --force replaces it").into());
        }
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        match parent {
            Some(folder) if !folder.is_dir() => {
                Err(format!("{}: there is no such folder", folder.display()).into())
            }
            _ => Ok(()),
        }
    }

    fn write(
        &self,
        what: &'static str,
        save: impl FnOnce(&Path) -> crate::Result<()>,
    ) -> Result<()> {
        let bar = spinner(what);
        save(&self.path)?;
        bar.finish_and_clear();
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.len())
    }
}

/// A bar on standard error, where that is a terminal.
fn progress(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed}");
    ProgressBar::new(1)
        .with_style(style.expect("a valid template"))
        .with_message(what)
}

/// The same for what cannot be counted.
fn spinner(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
    let bar = ProgressBar::new_spinner()
        .with_style(style.expect("a valid template"))
        .with_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn say(line: &str) -> Result<()> {
    said(writeln!(io::stdout().lock(), "{line}"))
}

/// Who closed standard output has read enough, as `head` has.
fn said(printed: io::Result<()>) -> Result<()> {
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed.map_err(|error| format!("standard output: {error}"))?),
    }
}
