"use strict";
// Tables sort by a click on their heading: numbers by value, everything else as text.
function value(cell) {
  const given = cell.dataset.v ?? cell.textContent.replaceAll("−", "-").replaceAll(",", "");
  const read = parseFloat(given);
  return Number.isNaN(read) ? given : read;
}
function order(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
function mark(heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  return down ? -1 : 1;
}
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const sign = mark(heading), column = heading.cellIndex, body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => sign * order(value(a.cells[column]), value(b.cells[column]))));
  });
}
// All runs: rows are made when they are asked for, from data, so that thousands stay quick.
const source = document.getElementById("data");
if (source) {
  const { columns, rows } = JSON.parse(source.textContent);
  const table = document.getElementById("all"), filter = document.getElementById("filter");
  const head = table.tHead.insertRow();
  for (const [title] of columns) head.append(Object.assign(document.createElement("th"), { textContent: title }));
  const shown = (cell, digits) => cell === null ? "" : digits === null ? cell
    : cell.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const made = rows.map((row) => {
    const line = document.createElement("tr");
    row.forEach((cell, k) => { line.insertCell().textContent = shown(cell, columns[k][1]); });
    return { row, line, text: line.textContent.toLowerCase() + " " + row.join(" ").toLowerCase() };
  });
  const fill = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = made.filter((one) => words.every((word) => one.text.includes(word)));
    table.tBodies[0].replaceChildren(...kept.map((one) => one.line));
    document.getElementById("shown").textContent = `${kept.length} of ${made.length}`;
  };
  head.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const sign = mark(heading), column = heading.cellIndex;
    made.sort((a, b) => sign * order(a.row[column] ?? Infinity, b.row[column] ?? Infinity));
    fill();
  });
  filter.addEventListener("input", fill);
  fill();
}
