// Numbers as people read them. Spaces are narrow and do not break.

const NNBSP = "\u202f";
export const NONE = "–";

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  const ms = value * 1000;
  if (ms === 0) return `0${NNBSP}ms`;
  if (ms < 0.1) return `<${NNBSP}0.1${NNBSP}ms`;
  if (ms < 10) return `${ms.toFixed(1)}${NNBSP}ms`;
  if (ms < 1000) return `${Math.round(ms)}${NNBSP}ms`;
  if (value < 60) return `${value.toFixed(2)}${NNBSP}s`;
  return duration(value);
}

export function duration(value) {
  const s = Math.floor(value);
  if (s < 60) return `${s}${NNBSP}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${NNBSP}min`;
  if (s < 86400) return `${Math.floor(s / 3600)}${NNBSP}h ${Math.floor((s % 3600) / 60)}${NNBSP}min`;
  return `${Math.floor(s / 86400)}${NNBSP}d ${Math.floor((s % 86400) / 3600)}${NNBSP}h`;
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(Math.round(value));

export function rate(value) {
  if (value === null) return NONE;
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit && value < 10 ? value.toFixed(1) : Math.round(value)}${NNBSP}${units[unit]}`;
}

export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)}${NNBSP}%`;
}

export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

export const clockTime = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");
