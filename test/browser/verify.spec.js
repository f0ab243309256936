// Tests the page that the link in a sign-up mail opens. WRENN_PASSWORD is the account's
// password.
import {expect, test} from './page.js'

const {WRENN_LINK: link, WRENN_PASSWORD: password} = process.env

test('a link opens an account, once and with its password', async ({page, context}) => {
	await page.goto(link)
	await expect(page).toHaveTitle(/Open your account/)
	await expect(page.getByLabel('Password')).toBeFocused()
	await page.getByLabel('Password').fill('not ' + password)
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('password is wrong')
	await page.getByLabel('Password').fill(password)
	await page.keyboard.press('Enter')
	await expect(page.getByRole('status')).toContainText('Your account is open')
	await expect(page.getByLabel('Password')).toBeHidden()
	expect(page.url()).not.toContain('token')
	// The user is logged in, with cookies that no script can read.
	const cookies = await context.cookies()
	expect(cookies.map(c => c.name).sort()).toEqual(['wrenn_access', 'wrenn_refresh'])
	expect(cookies.every(c => c.httpOnly && c.sameSite === 'Strict')).toBe(true)
	expect(await page.evaluate(() => document.cookie)).toBe('')
	expect((await page.request.get('/v1/me')).status()).toBe(200)

	await page.goto('about:blank')
	await page.goto(link)
	await page.getByLabel('Password').fill(password)
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('not valid')
})
