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
    Adapter, ApplyTo, Base, Checkpoint, DType, LabelKey, Labels, Opened, Selection, Untrained,
    Values, error::presentable, init_adapter, merge, open,
};

/// Characters of a file's own words in a table; they do not speak to the terminal.
const LONGEST: usize = 2000;

type Result<T> = std::result::Result<T, Box<dyn StdError>>;

/// Inspect, merge and convert VMix aesthetics adapters for Stable Diffusion.
///
/// An adapter turns any choice of aesthetic labels into values of a U-Net's cross-attention. A preset
/// holds the values of one choice. An init file holds labels to train. All are safetensors files.
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
    Merge(Merge),
    Convert(Convert),
    Validate(Validate),
}

/// Make an init file, the start of a training, from a checkpoint and a list of labels
///
/// The text encoders of the checkpoint turn every label's texts into AesEmb (paper, eq. 4). An init
/// file changes no image: `vmix train --labels` makes an adapter of it.
///
/// Examples:
///
///   vmix init --base sd15.safetensors --out labels.safetensors
///
///   vmix init --base sdxl.safetensors --labels labels.toml --out labels.safetensors
///
///   vmix init --base sd15.safetensors --label "warm light" --label "red: bright red | grey"
///   --out warm.safetensors
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Init {
    /// The checkpoint: a .safetensors file with the names of LDM, as ComfyUI loads, or the folder of a
    /// diffusers pipeline. SD1.5 and SDXL are told apart by their tensors.
    #[arg(short, long, value_name = "CHECKPOINT")]
    base: PathBuf,
    /// A labels.toml: tables `[[label]]` with `name` and, where wanted, `dimension`, `positive` (a text
    /// or a list of texts, else the name), `negative` (else a rare token), `default` and `neutral`
    /// (weights), `range` (else 0 to 1, widened to reach both) and `step` of its slider, and
    /// `display_names` (by language). Without it, and without --label, seven default labels.
    #[arg(short = 'L', long, value_name = "FILE", conflicts_with = "label")]
    labels: Option<PathBuf>,
    /// A label as "NAME", "NAME: TEXT" or "NAME: TEXT | NEGATIVE"; may be repeated.
    #[arg(short, long, value_name = "LABEL")]
    label: Vec<String>,
    #[command(flatten)]
    out: Out,
}

/// Say what a file is: kind, base, labels and their texts, how it was made, dtype, size, modelspec.
#[derive(Args)]
struct Inspect {
    /// An adapter, a preset or an init file.
    file: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Compute the values of one choice of labels and write them as a preset
///
/// A preset is for hosts that can only add values. It is larger than the whole adapter.
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
    /// A label, as "NAME" or "NAME=WEIGHT"; may be repeated. Labels that are left out are at their
    /// neutral weight, or at 0 where they have none. "all" is every label at 1 (trained adapters only),
    /// "none" leaves out every label. Without it, every label is at the file's own default.
    #[arg(short, long, value_name = "LABEL")]
    select: Vec<String>,
    /// What the unconditional pass of classifier-free guidance sees; without it, what the file says.
    #[arg(long, value_enum)]
    apply_to: Option<Passes>,
    /// Element type of the values.
    #[arg(long, value_enum, default_value_t = Float::Float32)]
    dtype: Float,
    #[command(flatten)]
    out: Out,
}

/// Make one adapter with some labels of one adapter, or of several
///
/// A label that is dropped stays at its neutral weight, or at 0 where it has none. Several adapters
/// must have linear coefficients and be for the same U-Net and the same passes (apply_to).
///
/// Examples:
///
///   vmix merge adapter.safetensors --label "vibrant color" --out color.safetensors
///
///   vmix merge color.safetensors light.safetensors --out both.safetensors
#[derive(Args)]
#[command(verbatim_doc_comment)]
struct Merge {
    /// The adapters to take labels from.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// A label to keep; may be repeated, and sets the order. Without it, all labels.
    #[arg(short, long = "label", alias = "labels", value_name = "NAME")]
    labels: Vec<String>,
    #[command(flatten)]
    out: Out,
}

/// Write a file anew with its rows, or its values, in another element type
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
    /// Adapters, presets and init files.
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
        Command::Merge(arguments) => merged(&arguments),
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
    let labels = match &arguments.labels {
        Some(path) => Labels::open_toml(path)?,
        None if arguments.label.is_empty() => Labels::standard(),
        None => Labels::from_entries(arguments.label.iter().map(String::as_str))?,
    };
    let base = Checkpoint::open(&arguments.base)?;
    for warning in base.text_encoder()?.warnings(&labels)? {
        let _ = writeln!(io::stderr(), "warning: {}", presentable(&warning, LONGEST));
    }
    let bar = progress("encoding labels");
    let untrained = init_adapter(&base, &labels, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    arguments
        .out
        .write("writing", |path| untrained.save(path))?;
    arguments
        .out
        .report(|size| Summary::of_untrained(&untrained, size))
}

fn bake(arguments: &Bake) -> Result<()> {
    arguments.out.check([&arguments.adapter])?;
    let adapter = Adapter::open(&arguments.adapter)?;
    let selection = selection(&arguments.select, adapter.labels())?;
    let apply_to = arguments.apply_to.map_or(adapter.apply_to(), ApplyTo::from);
    let values = adapter.values(&selection, apply_to, arguments.dtype.into())?;
    arguments.out.write("writing", |path| values.save(path))?;
    arguments
        .out
        .report(|size| Summary::of_preset(&values, size))
}

fn merged(arguments: &Merge) -> Result<()> {
    arguments.out.check(&arguments.files)?;
    let adapters: Vec<Adapter> = arguments
        .files
        .iter()
        .map(Adapter::open)
        .collect::<crate::Result<_>>()?;
    let mut made_for = BTreeSet::new();
    for adapter in &adapters {
        collect_bases(&made(adapter.metadata()), &mut made_for);
    }
    if made_for.len() > 1 {
        let names = made_for.into_iter().collect::<Vec<_>>().join(", ");
        let names = presentable(&names, LONGEST);
        let _ = writeln!(
            io::stderr(),
            "warning: made for different checkpoints: {names}"
        );
    }
    let labels: Vec<&str> = arguments.labels.iter().map(String::as_str).collect();
    let labels = (!labels.is_empty()).then_some(&*labels);
    let adapter = merge(&adapters, labels)?;
    arguments.out.write("writing", |path| adapter.save(path))?;
    arguments
        .out
        .report(|size| Summary::of_adapter(&adapter, size))
}

/// The checkpoints that an adapter, or its parts, were made for, where they say so.
fn collect_bases(made: &Value, bases: &mut BTreeSet<String>) {
    bases.extend(made["base"].as_str().map(str::to_owned));
    for part in made["parts"].as_array().into_iter().flatten() {
        collect_bases(part, bases);
    }
}

/// `vmix.made`; null where a file has none.
fn made(metadata: &BTreeMap<String, String>) -> Value {
    let made = metadata.get("vmix.made");
    made.and_then(|made| serde_json::from_str(made).ok())
        .unwrap_or(Value::Null)
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
    match open(&arguments.file)? {
        Opened::Adapter(adapter) => {
            let adapter = adapter.to_dtype(dtype)?;
            arguments.out.write("writing", |path| adapter.save(path))?;
            arguments
                .out
                .report(|size| Summary::of_adapter(&adapter, size))
        }
        Opened::Preset(values) => {
            let values = values.to_dtype(dtype)?;
            arguments.out.write("writing", |path| values.save(path))?;
            arguments
                .out
                .report(|size| Summary::of_preset(&values, size))
        }
        Opened::Untrained(_) => {
            let file = arguments.file.display();
            Err(format!("{file}: an init file has neither rows nor values to convert").into())
        }
    }
}

fn validate(arguments: &Validate) -> Result<()> {
    let mut refused = 0;
    for path in &arguments.files {
        // To open a file is to read and check all of it.
        match open(path) {
            Ok(opened) => {
                let kind = match opened {
                    Opened::Adapter(_) => "adapter",
                    Opened::Preset(_) => "preset",
                    Opened::Untrained(_) => "init file",
                };
                say(&format!("{}: a valid {kind}", path.display()))?;
            }
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

fn inspect(arguments: &Inspect) -> Result<()> {
    let size = fs::metadata(&arguments.file).map_or(0, |metadata| metadata.len());
    let summary = match open(&arguments.file)? {
        Opened::Adapter(adapter) => Summary::of_adapter(&adapter, size),
        Opened::Preset(values) => Summary::of_preset(&values, size),
        Opened::Untrained(untrained) => Summary::of_untrained(&untrained, size),
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
        let (labels, metadata) = (adapter.labels(), adapter.metadata());
        let mut summary = Self::new("adapter", adapter.base(), labels, metadata);
        summary.extend(json!({
            "coefficients": adapter.coefficient_kind().name(),
            "rows": adapter.row_sides().len(),
            "layers": layers(adapter.layers()),
            "dtype": adapter.dtype().name(),
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
        let (labels, metadata) = (values.labels(), values.metadata());
        let mut summary = Self::new("preset", values.base(), labels, &metadata);
        summary.extend(json!({
            "selection": selection,
            "layers": layers(values.layers()),
            "dtype": values.dtype().name(),
            "context_tokens": values.context_tokens(),
            "apply_to": values.apply_to().name(),
            "origin": values.origin(),
            "bytes": bytes,
        }));
        summary
    }

    fn of_untrained(untrained: &Untrained, bytes: u64) -> Self {
        let (labels, metadata) = (untrained.labels(), untrained.metadata());
        let mut summary = Self::new("init", untrained.base(), labels, metadata);
        summary.extend(json!({
            "context_tokens": untrained.context_tokens(),
            "context_dim": untrained.context_dim(),
            "bytes": bytes,
        }));
        summary
    }

    fn new(kind: &str, base: Base, labels: &Labels, metadata: &BTreeMap<String, String>) -> Self {
        let labels: Vec<Value> = labels
            .iter()
            .map(|label| {
                json!({
                    "name": label.name, "dimension": label.dimension,
                    "positive": label.positive, "negative": label.negative,
                    "default": short(label.default), "neutral": label.neutral.map(short),
                    "range": label.range.map(short), "step": short(label.step),
                    "effect": label.effect, "display_names": label.display_names,
                })
            })
            .collect();
        Self(json!({
            "kind": kind, "base": base.name(), "labels": labels,
            "made": made(metadata), "metadata": metadata,
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

    /// What it is, in words.
    fn what(&self) -> String {
        let method = self.0["made"]["method"].as_str().unwrap_or("");
        match self.text("kind") {
            "preset" => format!("preset of {method} labels"),
            "init" => "init file".to_owned(),
            kind => format!("{method} {kind}"),
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
        let layers = match layers {
            0 => String::new(),
            _ => format!("{layers} layers, "),
        };
        format!("{what} for {base}, {labels} label{plural}, {layers}{size}")
    }

    fn table(&self) -> Result<String> {
        let mut rows = vec![
            ("kind", self.what()),
            ("base", self.text("base").to_owned()),
        ];
        if let Some(made) = self.0["made"].as_object() {
            let shown = |value: &Value| match value {
                Value::String(text) => text.clone(),
                value => value.to_string(),
            };
            let parts = made
                .iter()
                .filter(|(key, _)| *key != "warnings") // below, a line each
                .map(|(key, value)| format!("{key}: {}", shown(value)));
            rows.push(("made", parts.collect::<Vec<_>>().join(", ")));
        }
        if self.0["coefficients"].is_string() {
            let count = self.0["rows"].to_string();
            rows.push(("rows", format!("{count}, {}", self.text("coefficients"))));
        }
        if self.0["dtype"].is_string() {
            rows.push(("dtype", self.text("dtype").to_owned()));
        }
        let context = match &self.0["context_dim"] {
            Value::Null => format!("{} tokens", self.0["context_tokens"]),
            dim => format!("{} tokens of width {dim}", self.0["context_tokens"]),
        };
        rows.push(("size", self.size()));
        if self.0["layers"].is_array() {
            rows.push(("layers", self.count("layers").to_string()));
        }
        rows.push(("context", context));
        if self.0["apply_to"].is_string() {
            rows.push(("apply_to", self.text("apply_to").to_owned()));
        }
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
        write!(table, "{}", self.effects())?;
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

    /// What was measured of every label, a line each; then what there is to be warned of.
    fn effects(&self) -> String {
        let mut lines = Vec::new();
        for label in self.0["labels"].as_array().into_iter().flatten() {
            let numbers = label["effect"].as_object().into_iter().flatten();
            let numbers: Vec<String> = numbers
                .map(|(name, x)| {
                    let x = format!("{:.3}", x.as_f64().unwrap_or(f64::NAN));
                    let x = x.trim_end_matches('0').trim_end_matches('.');
                    format!("{} {x}", presentable(name, LONGEST))
                })
                .collect();
            if !numbers.is_empty() {
                let name = presentable(label["name"].as_str().unwrap_or(""), LONGEST);
                lines.push(format!("effect of {name}: {}", numbers.join(", ")));
            }
        }
        let warnings = self.0["made"]["warnings"].as_array().into_iter().flatten();
        let warnings = warnings.filter_map(Value::as_str);
        lines.extend(warnings.map(|warning| format!("warning: {}", presentable(warning, LONGEST))));
        match lines.is_empty() {
            true => String::new(),
            false => format!("\n\n{}", lines.join("\n")),
        }
    }

    fn label_table(&self) -> String {
        let weight = if self.text("kind") == "preset" {
            "weight"
        } else {
            "default"
        };
        let head = [
            "label",
            "dimension",
            weight,
            "neutral",
            "range",
            "positive",
            "negative",
        ];
        let mut rows = vec![head.map(String::from)];
        for label in self.0["labels"].as_array().into_iter().flatten() {
            let text = |key: &str| presentable(label[key].as_str().unwrap_or(""), LONGEST);
            let weight = match &self.0["selection"] {
                Value::Null => &label["default"],
                selection => &selection[label["name"].as_str().unwrap_or("")],
            };
            let texts = |key: &str| {
                let texts = label[key].as_array().into_iter().flatten();
                let quoted = texts.map(|text| match text.as_str().unwrap_or("") {
                    "" => "(no text)".to_owned(),
                    text => presentable(text, LONGEST),
                });
                quoted.collect::<Vec<_>>().join(" / ")
            };
            let neutral = match &label["neutral"] {
                Value::Null => "none".to_owned(),
                neutral => neutral.to_string(),
            };
            rows.push([
                text("name"),
                text("dimension"),
                weight.to_string(),
                neutral,
                format!("{} to {}", label["range"][0], label["range"][1]),
                texts("positive"),
                texts("negative"),
            ]);
        }
        let widths: Vec<usize> = (0..head.len())
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

fn layers(layers: &[crate::Layer]) -> Vec<Value> {
    let of = |layer: &crate::Layer| {
        json!({
            "name": layer.name, "ldm_name": layer.ldm_name, "inner_dim": layer.inner_dim,
        })
    };
    layers.iter().map(of).collect()
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

    /// Says what was written.
    fn report(&self, summary: impl FnOnce(u64) -> Summary) -> Result<()> {
        let size = fs::metadata(&self.path)?.len();
        let (path, sentence) = (self.path.display(), summary(size).sentence());
        say(&format!("{path}: {sentence}"))
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
